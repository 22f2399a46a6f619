"""The server as the real openai client sees it: a process of its own, the bundled model, every route."""
from __future__ import annotations

import json
import threading
import typing
from concurrent.futures import ThreadPoolExecutor

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from edge_runtime import LLM  # noqa: E402
from tests.apps.servers import ServerProcess  # noqa: E402

MODEL = "edge-tiny"
TOPICS = ("museum", "harvest", "bridge", "library", "school", "market", "river", "garden", "hospital", "station",
          "farm", "theatre", "bakery", "harbour", "airport", "village", "tower", "forest", "island", "castle")
PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12},
                                           "age": {"type": "integer", "minimum": 1, "maximum": 99}},
          "required": ["name", "age"], "additionalProperties": False}
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather in a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["c", "f"]}},
        "required": ["city", "unit"], "additionalProperties": False}}}


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def server():
    with ServerProcess("--threads", "1") as process:
        yield process


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as found:
        yield found


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1) as found:
        yield found


def streamed(stream) -> tuple[str, str, list]:
    """Text, finish reason and chunks of a stream with one choice."""
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert len(reasons) == 1
    return text, reasons[0], chunks


def test_models(client):
    assert MODEL in [model.id for model in client.models.list()]
    found = client.models.retrieve(MODEL)
    assert found.object == "model" and found.edge_runtime["open"] and found.edge_runtime["context"] == 2048


def test_chat_whole_and_streamed_say_what_the_engine_says(client, llm):
    messages = say("Question: Who are you?")
    wanted = llm.chat(messages, temperature=0, max_tokens=None)
    whole = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert whole.choices[0].message.content == wanted.text
    assert whole.choices[0].finish_reason == wanted.finish_reason
    assert whole.usage.prompt_tokens == wanted.stats.prompt_tokens
    assert whole.usage.completion_tokens == wanted.stats.completion_tokens
    text, reason, chunks = streamed(client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert (text, reason) == (wanted.text, wanted.finish_reason)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_many_at_once_get_each_their_own_answer(client, llm):
    prompts = [f"Summarize the following text.\n\nThe {topic} opens on day {i}." for i, topic in enumerate(TOPICS)]
    wanted = [llm.chat(prompt, temperature=0, max_tokens=24).text for prompt in prompts]
    assert len(set(wanted)) >= 10
    barrier = threading.Barrier(len(prompts))

    def ask(i: int) -> str:
        barrier.wait()
        answer = client.chat.completions.create(model=MODEL, messages=say(prompts[i]), temperature=0, max_tokens=24,
                                                stream=i % 2 == 0)
        return streamed(answer)[0] if i % 2 == 0 else answer.choices[0].message.content

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, range(len(prompts)))) == wanted


def test_sampling_seed_n_and_stop(client):
    options = dict(model=MODEL, messages=say("Tell me about the harvest."), max_tokens=12, temperature=2.0, top_p=1.0)
    first, again, other = (client.chat.completions.create(**options, seed=seed).choices[0].message.content
                           for seed in (7, 7, 8))
    assert first == again != other
    many = client.chat.completions.create(**options, seed=7, n=4)
    texts = [choice.message.content for choice in many.choices]
    assert texts[0] == first and len(set(texts)) > 1
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    chunks = list(client.chat.completions.create(**options, seed=7, n=4, stream=True))
    joined = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == i) for i in range(4)]
    assert joined == texts
    plain = client.chat.completions.create(model=MODEL, messages=say("Hello"), temperature=0).choices[0]
    assert " can" in plain.message.content
    stopped = client.chat.completions.create(model=MODEL, messages=say("Hello"), temperature=0,
                                             stop=[" can"]).choices[0]
    assert stopped.message.content == plain.message.content.split(" can")[0] and stopped.finish_reason == "stop"
    assert streamed(client.chat.completions.create(model=MODEL, messages=say("Hello"), temperature=0, stop=" can",
                                                   stream=True))[0] == stopped.message.content
    cut = client.chat.completions.create(model=MODEL, messages=say("Hello"), temperature=0, max_completion_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2


def test_logprobs_and_logit_bias(client, llm):
    options = dict(model=MODEL, messages=say("Hello"), temperature=0, max_tokens=6)
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0]
    assert "".join(one.token for one in whole.logprobs.content) == whole.message.content
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 3 and one.top_logprobs[0].logprob >= one.logprob
               for one in whole.logprobs.content)
    chunks = list(client.chat.completions.create(**options, logprobs=True, top_logprobs=3, stream=True))
    parts = [one.token for chunk in chunks if chunk.choices[0].logprobs
             for one in chunk.choices[0].logprobs.content]
    assert parts == [one.token for one in whole.logprobs.content]
    first = llm.chat("Hello", temperature=0, max_tokens=1).token_ids[0]
    banned = client.chat.completions.create(**options, logit_bias={str(first): -100}).choices[0]
    assert not banned.message.content.startswith(llm.detokenize([first]))


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema_and_json_object(client, stream):
    options = dict(model=MODEL, messages=say("Who is there?"), max_tokens=200, temperature=1.0, seed=3, stream=stream)
    answer = client.chat.completions.create(**options, response_format={
        "type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}})
    found = json.loads(streamed(answer)[0] if stream else answer.choices[0].message.content)
    assert set(found) == {"name", "age"} and 1 <= found["age"] <= 99
    if not stream:
        answer = client.chat.completions.create(**{**options, "max_tokens": 400}, response_format={
            "type": "json_object"}, logit_bias={})
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_pydantic_parse_helper(client):
    pydantic = pytest.importorskip("pydantic")

    class Colour(pydantic.BaseModel):
        red: bool
        shade: typing.Literal["dark", "light"]

    answer = client.chat.completions.parse(model=MODEL, messages=say("A colour"), response_format=Colour, seed=1,
                                           max_tokens=100)
    assert isinstance(answer.choices[0].message.parsed, Colour)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_that_must_be_called(client, choice):
    options = dict(model=MODEL, messages=say("Weather?"), tools=[WEATHER], tool_choice=choice, seed=5, max_tokens=150,
                   parallel_tool_calls=False)
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.finish_reason == "tool_calls" and len(whole.message.tool_calls) == 1
    call = whole.message.tool_calls[0]
    assert call.function.name == "get_weather" and call.id
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("c", "f")
    chunks = list(client.chat.completions.create(**options, stream=True))
    deltas = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].function.name == "get_weather" and deltas[0].id
    assert all(part.index == 0 for part in deltas)
    assert json.loads("".join(part.function.arguments or "" for part in deltas)) == arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_a_call_and_its_result(client):
    messages = [*say("Weather?"), {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function",
         "function": {"name": "get_weather", "arguments": "{\"city\": \"Rome\"}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none",
                                            max_tokens=8)
    assert answer.choices[0].message.tool_calls is None and answer.usage.prompt_tokens > 30


def test_completions(client, llm):
    wanted = llm.generate("The meeting", temperature=0, max_tokens=16)
    whole = client.completions.create(model=MODEL, prompt="The meeting", temperature=0, logprobs=2)
    assert whole.choices[0].text == wanted.text and whole.choices[0].finish_reason == wanted.finish_reason
    assert "".join(whole.choices[0].logprobs.tokens) == wanted.text
    many = client.completions.create(model=MODEL, prompt=["The meeting", "On Monday"], temperature=0, n=2, echo=True,
                                     max_tokens=4)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text and many.choices[2].text.startswith("On Monday")
    ids = llm.tokenize("The meeting")
    assert client.completions.create(model=MODEL, prompt=ids, temperature=0).choices[0].text == wanted.text
    parts = list(client.completions.create(model=MODEL, prompt="The meeting", temperature=0, stream=True,
                                           stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == wanted.text
    assert parts[-1].usage.completion_tokens == wanted.stats.completion_tokens


def test_embeddings(client, llm):
    texts = ["The harvest was good.", "The bridge is closed."]
    wanted = llm.embed(texts)
    for encoding in ("float", "base64", None):
        options = {} if encoding is None else {"encoding_format": encoding}
        found = client.embeddings.create(model=MODEL, input=texts, **options)
        vectors = found.data
        assert [one.index for one in vectors] == [0, 1] and found.usage.prompt_tokens > 4
        if encoding != "base64":
            assert all(abs(a - b) < 1e-4 for one, row in zip(vectors, wanted) for a, b in zip(one.embedding, row))
    short = client.embeddings.create(model=MODEL, input=llm.tokenize(texts[0]), dimensions=8).data[0].embedding
    assert len(short) == 8 and abs(sum(x * x for x in short) - 1) < 1e-4


def test_responses(client, llm):
    wanted = llm.chat("Hello", temperature=0)
    whole = client.responses.create(model=MODEL, input="Hello", temperature=0)
    assert whole.output_text == wanted.text and whole.status == "completed"
    assert whole.usage.output_tokens == wanted.stats.completion_tokens
    with client.responses.stream(model=MODEL, input=say("Hello"), temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == wanted.text
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert kinds.index("response.output_item.added") < kinds.index("response.output_text.delta")
    assert kinds.index("response.output_text.done") < kinds.index("response.output_item.done")
    more = client.responses.create(model=MODEL, input="And you?", previous_response_id=whole.id, temperature=0)
    assert more.usage.input_tokens > whole.usage.input_tokens + whole.usage.output_tokens
    assert client.responses.retrieve(more.id).output_text == more.output_text
    client.responses.delete(more.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(more.id)
    cut = client.responses.create(model=MODEL, input="Hello", max_output_tokens=2, instructions="Be kind.", store=False)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.BadRequestError, match="not found"):
        client.responses.create(model=MODEL, input="x", previous_response_id=cut.id)


def test_responses_with_schema_and_tools(client):
    answer = client.responses.create(
        model=MODEL, input="Who?", max_output_tokens=200,
        text={"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}})
    assert set(json.loads(answer.output_text)) == {"name", "age"}
    tool = {"type": "function", **WEATHER["function"], "strict": True}
    options = dict(model=MODEL, input="Weather?", tools=[tool], tool_choice="required", parallel_tool_calls=False,
                   max_output_tokens=150, temperature=0)
    called = client.responses.create(**options)
    item = called.output[0]
    assert item.type == "function_call" and item.name == "get_weather" and json.loads(item.arguments)["unit"] in "cf"
    with client.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output[0].arguments == item.arguments
    assert "response.function_call_arguments.done" in kinds
    client.responses.create(model=MODEL, previous_response_id=called.id, max_output_tokens=4, input=[
        {"type": "function_call_output", "call_id": item.call_id, "output": "Sunny"}])


def test_errors_as_the_client_knows_them(client):
    def refused(kind, code, param=None, **body):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": say("Hello"), **body})
        assert caught.value.code == code and caught.value.param == param

    refused(openai.NotFoundError, "model_not_found", "model", model="gpt-9")
    refused(openai.BadRequestError, "context_length_exceeded", "messages", messages=say("hello " * 5000))
    refused(openai.BadRequestError, "context_length_exceeded", "messages", messages=say("hello " * 5000), stream=True)
    refused(openai.BadRequestError, "invalid_type", "messages", messages="Hello")
    refused(openai.BadRequestError, "invalid_type", "temperature", temperature="warm")
    refused(openai.BadRequestError, "decimal_above_max_value", "temperature", temperature=9)
    refused(openai.BadRequestError, "unknown_parameter", "colour", extra_body={"colour": "red"})
    refused(openai.BadRequestError, "invalid_value", "stop", stop=[""])
    refused(openai.BadRequestError, "invalid_value", "response_format", response_format={
        "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer", "minimum": 2, "maximum": 1}}})
    refused(openai.BadRequestError, "invalid_value", "placement", extra_body={"placement": "device"})
    refused(openai.BadRequestError, "invalid_value", "tool_choice", tool_choice="required")
    for call, name in ((client.completions.create, "prompt"), (client.responses.create, "input"),
                       (client.embeddings.create, "input")):
        with pytest.raises(openai.BadRequestError) as caught:
            call(**{"model": MODEL, name: "hello " * 5000})
        assert caught.value.code == "context_length_exceeded" and caught.value.param == name


def test_extensions(client):
    answer = client.chat.completions.create(model=MODEL, messages=say("Hello"), max_tokens=4, extra_body={
        "top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "priority": "batch",
        "placement": "host", "early_exit": None})
    assert answer.usage.completion_tokens == 4 and answer.edge_runtime["ttft"] > 0
