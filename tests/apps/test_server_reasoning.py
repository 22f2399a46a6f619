"""Thoughts apart from answers: any cut of the stream gives the same two texts, over HTTP whole and streamed alike."""
from __future__ import annotations

import itertools
import json
import random

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from edge_runtime.apps.model_host import ModelHost  # noqa: E402
from edge_runtime.apps.server.reasoning import ReasoningParser, opened  # noqa: E402
from edge_runtime.apps.server.tool_formats import MISTRAL  # noqa: E402
from edge_runtime.apps.server.tool_parser import ToolParser  # noqa: E402
from edge_runtime.chat_template import ChatTemplate  # noqa: E402
from edge_runtime.outcome import Chunk  # noqa: E402
from tests.apps.servers import echo_llm, serving  # noqa: E402
from tests.fake_device import byte_tokenizer  # noqa: E402

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def parted(text: str, cuts: list[int], begins_inside: bool) -> tuple[str, str]:
    parser = ReasoningParser(begins_inside, byte_tokenizer())
    edges = [0, *cuts, len(text)]
    thought = answer = ""
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        ids = tuple(text[a:b].encode())
        more, piece = parser.push(Chunk(text[a:b], ids, "stop" if i == len(edges) - 2 else None))
        thought, answer = thought + more, answer + piece.text
    return thought, answer


@pytest.mark.parametrize("text, begins_inside, wanted", [
    ("<think>\nI see.\n</think>\n\nYes. ", False, ("I see.", "Yes. ")),
    (" \n<think>I</think>Yes", False, ("I", "Yes")),
    ("<think>\n\n</think>\n\nYes", False, ("", "Yes")),
    ("I see. \n</think>\n\nYes\n", True, ("I see.", "Yes\n")),
    ("\n<think>I see.</think>Yes", True, ("I see.", "Yes")),
    ("</think>Yes", True, ("", "Yes")),
    ("<think>cut off </thin", False, ("cut off </thin", "")),
    ("<think>a < b </ think> </think>c </think> d", False, ("a < b </ think>", "c </think> d")),
    ("  Yes, <think>no</think> ", False, ("", "  Yes, <think>no</think> ")),
    ("<thin", False, ("", "<thin")), ("<thing>", False, ("", "<thing>")), (" ", False, ("", " ")),
    ("", False, ("", "")), ("<think>", False, ("", "")), ("a <</think><", True, ("a <", "<")),
    ("never closed", True, ("never closed", "")),
])
def test_every_cut_gives_the_same(text, begins_inside, wanted):
    assert parted(text, [], begins_inside) == wanted
    for cut in range(len(text) + 1):
        assert parted(text, [cut], begins_inside) == wanted, cut
    assert parted(text, list(range(1, len(text))), begins_inside) == wanted
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(text) + 1), k=3))
        assert parted(text, cuts, begins_inside) == wanted, cuts


def test_a_special_token_that_opens_a_call_is_found_behind_the_thought():
    from dataclasses import replace

    mark, text = 256, '<think>[x] é</think>\n[{"name": "add", "arguments": {"a": 1}}]'
    at = text.index("[{")
    ids = (*text[:at].encode(), mark, *text[at:].encode())
    tokenizer = byte_tokenizer()
    thought, piece = ReasoningParser(False, tokenizer).push(Chunk(text, ids, "stop"))
    parser = ToolParser(replace(MISTRAL, opening_id=mark), frozenset({"add"}), True, tokenizer)
    deltas = parser.push(piece)
    assert thought == "[x] é" and [set(delta) for delta in deltas] == [{"tool_calls"}]


def test_what_prompts_open():
    assert opened("<|Assistant|><think>\n") and not opened("<think>\n\n</think>\n\n") and not opened("a <think> b")


def deltas_of(stream) -> tuple[str, str, str | None, list]:
    thought = answer = ""
    reason, calls = None, []
    for chunk in stream:
        delta = chunk.choices[0].delta
        thought += getattr(delta, "reasoning_content", None) or ""
        answer += delta.content or ""
        calls += [call.function.name for call in delta.tool_calls or () if call.function.name]
        reason = chunk.choices[0].finish_reason or reason
    return thought, answer, reason, calls


@pytest.mark.parametrize("interval", [0, 0.04])
def test_over_http_whole_and_streamed(interval):
    with (serving(ModelHost.of(echo_llm(), "echo"), stream_interval=interval) as url,
          openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client):
        def ask(said: str, form: str | None = "separate", **options):
            return client.chat.completions.create(
                model="echo", messages=[{"role": "user", "content": f"SAY:{said}"}], temperature=0,
                extra_body={} if form is None else {"reasoning_format": form}, **options)

        said = "<think>\nHm, é.\n</think>\n\nYes."
        for form in (None, "none"):
            message = ask(said, form).choices[0].message
            assert message.content == said and not hasattr(message, "reasoning_content")
            assert deltas_of(ask(said, form, stream=True))[:2] == ("", said)
        for message in (choice.message for choice in ask(said, n=2).choices):
            assert (message.reasoning_content, message.content) == ("Hm, é.", "Yes.")
        assert deltas_of(ask(said, stream=True)) == ("Hm, é.", "Yes.", "stop", [])
        plain = ask("Yes.").choices[0].message
        assert plain.content == "Yes." and not hasattr(plain, "reasoning_content")
        cut = ask(said, max_tokens=10).choices[0]
        assert (cut.message.reasoning_content, cut.message.content, cut.finish_reason) == ("Hm", "", "length")
        thought = f"<think>Call {CALL}?</think>Sure.{CALL}"
        called = ask(thought, tools=[ADD]).choices[0]
        assert called.message.reasoning_content == f"Call {CALL}?" and called.message.content == "Sure."
        assert len(called.message.tool_calls) == 1 and called.finish_reason == "tool_calls"
        assert deltas_of(ask(thought, tools=[ADD], stream=True)) == (f"Call {CALL}?", "Sure.", "tool_calls", ["add"])
        counted = ask(said, logprobs=True).choices[0]
        assert len(counted.logprobs.content) == len(said.encode())
        tokens = [one for chunk in ask(said, stream=True, logprobs=True) if chunk.choices[0].logprobs
                  for one in chunk.choices[0].logprobs.content]
        assert len(tokens) == len(said.encode())
        with pytest.raises(openai.BadRequestError, match="none"):
            ask(said, "deepseek")


def test_a_template_that_opens_the_thought():
    llm = echo_llm()
    llm._loaded.chat_template = ChatTemplate(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}[assistant] "
        "{% if add_generation_prompt and not quick %}<think>\n{% endif %}")
    with (serving(ModelHost.of(llm, "echo")) as url,
          openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client):
        # The device says what its script goes on with behind the opened thought.
        options = dict(model="echo", messages=[{"role": "user", "content": "SAY:<think>\nHm.</think>\nYes"}],
                       temperature=0)
        separate = {"reasoning_format": "separate"}
        message = client.chat.completions.create(**options, extra_body=separate).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm.", "Yes")
        assert client.chat.completions.create(**options).choices[0].message.content == "Hm.</think>\nYes"
        held = client.chat.completions.create(**options, max_tokens=40, response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 7}}},
            extra_body=separate).choices[0].message
        assert json.loads(held.content) == 7 and not hasattr(held, "reasoning_content")
        quick = client.chat.completions.create(
            **{**options, "messages": [{"role": "user", "content": "SAY:Yes"}]},
            extra_body={**separate, "chat_template_kwargs": {"quick": True}}).choices[0].message
        assert quick.content == "Yes" and not hasattr(quick, "reasoning_content")
