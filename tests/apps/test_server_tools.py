"""Tool calls: read back from what models write, in any cut of the stream, and held to the tools where that is asked."""
from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")

from edge_runtime.apps.model_host import ModelHost
from edge_runtime.apps.server.errors import ApiError
from edge_runtime.apps.server.messages import rendered_messages
from edge_runtime.apps.server.tool_formats import (
    HERMES,
    LLAMA,
    MISTRAL,
    TAGGED,
    ToolFormat,
    tool_use,
)
from edge_runtime.apps.server.tool_parser import ToolParser
from edge_runtime.chat_template import ChatTemplate
from edge_runtime.outcome import Chunk
from edge_runtime.sampling import SamplingParams
from tests.apps.servers import echo_llm, serving
from tests.edge_runtime.llms import fake_llm
from tests.fake_device import byte_tokenizer

ADD = {"type": "function", "function": {"name": "add", "strict": True, "parameters": {
    "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"$ref": "#/$defs/n"}},
    "required": ["a", "b"], "additionalProperties": False, "$defs": {"n": {"enum": [1, 2]}}}}}
NOW = {"type": "function", "function": {"name": "now"}}
NAMES = frozenset({"add", "now"})
CALL, NOW_CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}', '{"name": "now", "arguments": {}}'
ADDED = ("add", {"a": 1, "b": 2})
NOWED = ("now", {})


def parsed(form: ToolFormat, text: str, cuts: list[int], parallel: bool = True) -> tuple[str, list[tuple[str, object]]]:
    """What a parser makes of a text that comes in pieces."""
    parser = ToolParser(form, NAMES, parallel, byte_tokenizer())
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    deltas = [delta for i, piece in enumerate(pieces)
              for delta in parser.push(Chunk(piece, finish_reason="stop" if i == len(pieces) - 1 else None))]
    said, calls = "", []
    for delta in deltas:
        assert set(delta) in ({"content"}, {"tool_calls"})
        said += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                assert part["index"] == len(calls)
                calls.append([part["function"]["name"], part["function"]["arguments"]])
            else:
                calls[part["index"]][1] += part["function"]["arguments"]
    assert parser.calls == len(calls)
    return said, [(name, json.loads(arguments)) for name, arguments in calls]


CASES = [
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [ADDED]),
    (HERMES, f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{NOW_CALL}</tool_call>", "Let me see.",
     [ADDED, NOWED]),
    (HERMES, '<tool_call>{"arguments": {"a": 1, "b": 2}, "name": "add"}</tool_call>', "", [ADDED]),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>', "", [ADDED]),
    (HERMES, "a < b and <tool> is no call", "a < b and <tool> is no call", []),
    (HERMES, '<tool_call>{"name": "fly", "arguments": {}}</tool_call>', None, []),
    (HERMES, "<tool_call> just text </tool_call>", None, []),
    (HERMES, "ends in <tool_ca", "ends in <tool_ca", []),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"s": "}]\\"{ </tool_call>", "l": [1, {"x": null}]}}</tool_call>',
     "", [("add", {"s": '}]"{ </tool_call>', "l": [1, {"x": None}]})]),
    (MISTRAL, f"[TOOL_CALLS][{CALL}, {NOW_CALL}]", "", [ADDED, NOWED]),
    (MISTRAL, '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}', "", [ADDED]),
    (TAGGED, f"<|tool_call|>[{CALL},{NOW_CALL}]<|/tool_call|>", "", [ADDED, NOWED]),
    (LLAMA, '{"name": "add", "parameters": {"a": 1, "b": 2}}', "", [ADDED]),
    (LLAMA, '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "add", "parameters": {"a": 1, "b": 2}}', "",
     [NOWED, ADDED]),
    (LLAMA, 'Text with {"name": "add"}', 'Text with {"name": "add"}', []),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
]


@pytest.mark.parametrize("form, text, said, calls", CASES)
def test_calls_are_read_however_the_stream_is_cut(form, text, said, calls):
    for seed in range(40):
        rng = random.Random(seed)
        count = 0 if seed == 0 else rng.randint(1, min(len(text) - 1, 20))
        cuts = list(range(1, len(text))) if seed == 1 else sorted(rng.sample(range(1, len(text)), count))
        found = parsed(form, text, cuts)
        assert found[1] == calls, f"seed {seed}"
        if said is not None:
            assert found[0] == said, f"seed {seed}"
        else:
            assert found[0].replace("</tool_call>", "").strip() in text, f"seed {seed}"


def test_only_one_call_where_more_are_not_wanted():
    assert parsed(HERMES, f"<tool_call>{CALL}</tool_call><tool_call>{NOW_CALL}</tool_call>", [], False)[1] == [ADDED]


def test_a_mark_that_is_a_special_token_is_seen_in_the_ids():
    tokenizer = byte_tokenizer()
    special = tokenizer.special_tokens["<x>"]
    form = ToolFormat("mistral", "<x>", "", array=True, opening_id=special)
    parser = ToolParser(form, NAMES, True, tokenizer)
    ids = (*b"Hi ", special, *f"[{CALL}]".encode())
    deltas = parser.push(Chunk(f"Hi [{CALL}]", tuple(ids), "stop"))
    assert deltas[0] == {"content": "Hi"} and deltas[1]["tool_calls"][0]["function"]["name"] == "add"


@pytest.mark.parametrize("source, name, known", [
    ("{{ tools }} <tool_call>", "hermes", True), ("{{ tools }} [TOOL_CALLS]", "mistral", True),
    ("{{ tools }} <|tool_call|>", "tagged", True), ('{{ tools }} {"name": x, "parameters": y}', "llama", True),
    ("{{ messages }}", "hermes", False)])
def test_formats_are_found_in_the_template(source, name, known):
    with fake_llm(chat_template=ChatTemplate(source)) as llm:
        found = tool_use(llm, [ADD, NOW], None, None)
        assert found is not None and found.format.name == name and (found.schemas is not None) == known
        messages = rendered_messages(llm, [{"role": "user", "content": "x"}], found)
        assert ("<tools>" in messages[0]["content"]) != known


@pytest.mark.parametrize("source", ["{{ tools }} <tool_call>", "{{ tools }} [TOOL_CALLS]", "{{ tools }} <|tool_call|>",
                                    '{{ tools }} {"name": x, "parameters": y}', "{{ messages }}"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_model_that_must_call_does_in_its_own_format(source, choice):
    with fake_llm(chat_template=ChatTemplate(source)) as llm:
        for seed in range(3):
            use = tool_use(llm, [ADD, NOW], choice, False)
            reply = llm.generate("x", SamplingParams(grammar=use.grammar, max_tokens=300, seed=seed, temperature=1.0))
            assert reply.finish_reason == "stop", reply
            text, calls = use.parsed(reply)
            assert text == "" and len(calls) == 1
            arguments = json.loads(calls[0]["function"]["arguments"])
            if calls[0]["function"]["name"] == "add":
                assert 0 <= arguments["a"] <= 9 and arguments["b"] in (1, 2)
            else:
                assert choice == "required" and arguments == {}


def test_strict_tools_hold_calls_that_the_model_makes_by_itself():
    say = "Sure. <tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 77, \"c\": true}}\n</tool_call> done"
    with echo_llm() as llm:
        use = tool_use(llm, [ADD], "auto", None)
        reply = llm.chat(f"SAY:{say}", tools=use.schemas, grammar=use.grammar, max_tokens=200, temperature=0)
        text, calls = use.parsed(reply)
        assert text.startswith("Sure.")
        arguments = json.loads(calls[0]["function"]["arguments"])
        assert set(arguments) == {"a", "b"} and 0 <= arguments["a"] <= 9


def test_what_does_not_fit_is_refused():
    with fake_llm() as llm:
        for tools, choice, says in (([], "required", "only allowed"), ([ADD, ADD], None, "same name"),
                                    ([ADD], {"type": "function", "function": {"name": "sub"}}, "not among")):
            with pytest.raises(ApiError, match=says):
                tool_use(llm, tools, choice, None)
        assert tool_use(llm, [ADD], "none", None) is None


def test_arguments_reach_templates_as_objects():
    llm = SimpleNamespace(chat_template=ChatTemplate("{{ messages }} tool_calls"))
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}}
    found = rendered_messages(llm, [{"role": "assistant", "content": None, "tool_calls": [call]}], None)
    assert found[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    call["function"]["arguments"] = "{"
    with pytest.raises(ApiError, match="no JSON"):
        rendered_messages(llm, [{"role": "assistant", "content": None, "tool_calls": [call]}], None)


def test_over_http_a_model_may_call_or_answer():
    openai = pytest.importorskip("openai")
    with (serving(ModelHost.of(echo_llm(), "echo")) as url,
          openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client):
        options = dict(model="echo", tools=[ADD, NOW], temperature=0)
        text = f"SAY:I add.<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{NOW_CALL}</tool_call>"
        messages = [{"role": "user", "content": text}]
        choice = client.chat.completions.create(messages=messages, **options).choices[0]
        assert choice.message.content == "I add." and choice.finish_reason == "tool_calls"
        assert [call.function.name for call in choice.message.tool_calls] == ["add", "now"]
        with client.chat.completions.stream(messages=messages, **options) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion().choices[0]
        assert final.message.content == "I add." and final.finish_reason == "tool_calls"
        assert [(c.function.name, json.loads(c.function.arguments)) for c in final.message.tool_calls] == [ADDED, NOWED]
        plain = client.chat.completions.create(messages=[{"role": "user", "content": "SAY:no call"}], **options)
        assert plain.choices[0].message.content == "no call" and plain.choices[0].finish_reason == "stop"
        none = client.chat.completions.create(messages=messages, tool_choice="none", **options).choices[0]
        assert "<tool_call>" in none.message.content and none.message.tool_calls is None
