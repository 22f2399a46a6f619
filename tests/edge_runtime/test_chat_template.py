"""Chat templates: choosing, rendering, refusing, and the bounds on hostile ones."""
from __future__ import annotations

import threading
import time
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from edge_runtime.chat_template import ChatTemplate, encode_chat
from edge_runtime.errors import ChatTemplateError, InvalidRequestError
from edge_runtime.tokenizer import Tokenizer
from tests.chat_templates import CHATS, TEMPLATES, TOOLS
from tests.vocabularies import bpe_metadata, spm_metadata

HELLO = [{"role": "user", "content": "Hello"}]


def metadata(**templates: Any) -> dict[str, Any]:
    return {**bpe_metadata("llama-bpe"), **{f"tokenizer.chat_template{k}": v for k, v in templates.items()}}


def from_metadata(**templates: Any) -> ChatTemplate:
    data = metadata(**templates)
    return ChatTemplate.from_metadata(data, Tokenizer.from_metadata(data))


def test_chatml() -> None:
    template = ChatTemplate(TEMPLATES["chatml"])
    assert template.render(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


@pytest.mark.parametrize("name", ["chatml", "qwen"])
def test_a_message_that_was_broken_off_is_continued(name: str) -> None:
    chat = [*HELLO, {"role": "assistant", "content": "The answer "}]
    text = ChatTemplate(TEMPLATES[name]).render(chat, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nThe answer ")


def test_a_template_that_drops_the_last_message_cannot_continue_it() -> None:
    with pytest.raises(ChatTemplateError, match="cannot be continued"):
        ChatTemplate("{{ messages[0].content }}").render(
            [*HELLO, {"role": "assistant", "content": "The"}], continue_final_message=True)


def test_tools_are_json_without_html_escapes() -> None:
    text = ChatTemplate(TEMPLATES["qwen"]).render(HELLO, tools=TOOLS)
    assert '"description": "Weather of a <city>\'s \\"centre\\" & more"' in text and "ville é ☃" in text


def test_extra_variables() -> None:
    template = ChatTemplate(TEMPLATES["qwen"])
    assert template.render(HELLO, enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    assert not template.render(HELLO).endswith("</think>\n\n")


def test_strftime_now() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}")
    assert template.render(HELLO) == datetime.now().strftime("%Y")


def test_special_tokens_of_the_file() -> None:
    assert from_metadata(**{"": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}"}).render(HELLO) == "<s>|</s>|"


@pytest.mark.parametrize("templates", [{}, {"": ""}, {"": "  \n"}, {".rag": "x"}])
def test_no_template_is_an_error_not_a_guess(templates: dict[str, str]) -> None:
    with pytest.raises(ChatTemplateError, match="no chat template"):
        from_metadata(**templates)


def test_named_templates() -> None:
    template = from_metadata(**{
        "": "default {{ tools }}", ".tool_use": "with tools {{ tools | length }}", ".rag": "rag"})
    assert template.render(HELLO) == "default None"
    assert template.render(HELLO, tools=TOOLS) == "with tools 1"
    assert template.render(HELLO, name="rag") == "rag"
    assert template.render(HELLO, name="default", tools=TOOLS).startswith("default [")
    with pytest.raises(ChatTemplateError, match="default, rag, tool_use"):
        template.render(HELLO, name="nothing")


def test_a_list_of_names_is_no_template() -> None:
    data = {**metadata(**{"": "d"}), "tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": "r"}
    template = ChatTemplate.from_metadata(data, Tokenizer.from_metadata(data))
    assert sorted(template.named) == ["rag"]


@pytest.mark.parametrize("value", [5, ["x"], {"a": 1}])
def test_a_template_must_be_text(value: object) -> None:
    with pytest.raises(ChatTemplateError, match="must be a string"):
        from_metadata(**{"": value})


def test_tools_that_the_template_would_drop() -> None:
    with pytest.raises(ChatTemplateError, match="does not know tools"):
        ChatTemplate(TEMPLATES["chatml"]).render(HELLO, tools=TOOLS)
    assert ChatTemplate(TEMPLATES["chatml"]).render(HELLO, tools=[])


def test_text_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplate(TEMPLATES["parts"]).render(parts) == "user: (a)(b)"
    assert ChatTemplate(TEMPLATES["chatml"]).render(parts, add_generation_prompt=False) == (
        "<|im_start|>user\na\nb<|im_end|>\n")


def test_reasoning_under_any_name() -> None:
    template = ChatTemplate("{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}")
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert template.render([{"role": "assistant", "content": "x", name: "why"}]) == "why|why"


BAD_MESSAGES: list[tuple[Any, str]] = [
    ([], "messages"), ("hi", "messages"), ({"role": "user", "content": "x"}, "messages"), (None, "messages"),
    (["hi"], r"messages\[0\]"), ([*HELLO, {"role": "robot", "content": "x"}], r"messages\[1\].role"),
    ([{"content": "x"}], r"messages\[0\].role"), ([{"role": "user"}], r"messages\[0\].content"),
    ([{"role": ["user"], "content": "x"}], r"messages\[0\].role"),
    ([{"role": "user", "content": None}], "content"), ([{"role": "user", "content": 5}], "content"),
    ([{"role": "user", "content": b"x"}], "content"), ([{"role": "user", "content": {"text": "x"}}], "content"),
    ([{"role": "user", "content": ["x"]}], r"content\[0\]"),
    ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], r"content\[0\]"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], r"content\[0\]"),
    ([{"role": "user", "content": "x", "extra": object()}], "JSON"),
]


@pytest.mark.parametrize("messages,where", BAD_MESSAGES, ids=range(len(BAD_MESSAGES)))
def test_malformed_messages(messages: Any, where: str) -> None:
    with pytest.raises(InvalidRequestError, match=where):
        ChatTemplate(TEMPLATES["chatml"]).render(messages)


@pytest.mark.parametrize("tools", ["x", {"a": 1}, [5], [print], 5])
def test_malformed_tools(tools: Any) -> None:
    with pytest.raises(InvalidRequestError, match="tools"):
        ChatTemplate(TEMPLATES["qwen"]).render(HELLO, tools=tools)


def test_messages_are_not_changed_and_carry_no_methods() -> None:
    class Loud(str):
        def leak(self) -> str:
            return "secret"

    messages = [{"role": "user", "content": Loud("x"), "n": np.float32(1.5)}]
    assert ChatTemplate("{{ messages[0].content.leak }}{{ messages[0].n }}").render(messages) == "1.5"
    assert type(messages[0]["content"]) is Loud


def test_a_template_may_refuse() -> None:
    with pytest.raises(ChatTemplateError, match="Roles must alternate"):
        ChatTemplate(TEMPLATES["mistral"]).render([*HELLO, *HELLO])


@pytest.mark.parametrize("source", [
    "{% for %}", "{{ x", "{% if %}", "{{ 'a' | nosuchfilter }}", "{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{{ messages[0].content.nothing.more }}", "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{{ messages() }}",
])
def test_broken_templates(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize("source", ["", "  ", "x" * (1 << 20) + "x"])
def test_sources_out_of_bounds(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source)


GROW = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ END }}"
HOSTILE = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(10**9) %}{% endfor %}", "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    "{{ 'a' * 10**10 }}", "{{ 10**10 * 'a' }}", "{{ [1] * 10**10 }}", "{{ 9**(9**9) }}", "{{ 2 ** 100000 }}",
    *(GROW.replace("START", a).replace("STEP", b).replace("END", c) for a, b, c in (
        ("'aa'", "ns.x ~ ns.x", "ns.x"), ("'aa'", "ns.x + ns.x", "ns.x"), ("[1]", "[ns.x, ns.x]", "ns.x | tojson"),
        ("[1]", "(ns.x, ns.x)", "ns.x == ns.x"), ("[1]", "{'a': ns.x, 'b': ns.x}", "ns.x"),
        ("[1]", "dict(a=ns.x, b=ns.x)", "ns.x"), ("'aa'", "ns.x.replace('a', 'aa')", "ns.x"),
        ("'aa'", "'%s%s' % (ns.x, ns.x)", "ns.x"), ("'aa'", "[ns.x, ns.x] | join", "ns.x"),
        ("'aa'", "ns.x.join(['b', 'b', 'b'])", "ns.x"), ("2", "ns.x * ns.x", "ns.x"))),
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "{% macro m(n) %}{{ m(n - 1) }}{{ m(n - 1) }}{% endmacro %}{{ m(50) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ 'a' | center(10**10) }}", "{{ 'a'.center(10**10) }}", "{{ 'a'.ljust(10**10) }}", "{{ 'a'.zfill(10**10) }}",
    "{{ '\t'.expandtabs(10**10) }}", "{{ '%10000000000d' % 1 }}", "{{ '%*d' % (10**10, 1) }}",
    "{{ '{:>10000000000}'.format(1) }}", "{{ '{:>{}}'.format(1, 10**10) }}", "{{ '%10000000000d' | format(1) }}",
    "{{ [1] | batch(10**10, 'x') | list }}", "{{ [1] | slice(10**10, 'x') | list }}", "{{ 1.5 | round(10**9) }}",
    "{{ 'a\nb' | indent(10**10) }}", "{{ [1] | tojson(indent=10**10) }}", "{{ (5).to_bytes(10**10, 'big') }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}", "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{% set s = 'a' * 1000000 %}{{ range(100000) | join(s) | length }}", "{{ ['a' * 1000000] * 100000 }}",
    "{{ range(100000) | map('center', 100000) | list | length }}", "{{ 'a'.translate({97: 'b' * 4000000}) }}",
    "{{ range(100000) | select('in', range(99999) | list) | list | length }}", "{{ ([[1]] * 100000) | sum(start=[]) }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}", "{{ messages.append(1) }}", "{{ self.__init__.__globals__ }}",
    "{{ ''.encode().center(10**10) }}", "{% set ns = namespace(__class__=1) %}", "{{ lipsum.__globals__ }}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_are_stopped(source: str) -> None:
    template = ChatTemplate(source, time_limit=0.2)
    start = time.thread_time()
    with pytest.raises(ChatTemplateError):
        template.render(HELLO)
    assert time.thread_time() - start < 2


def test_a_long_conversation_is_no_hostile_one() -> None:
    long = [{"role": "user", "content": "x" * 20_000}, {"role": "assistant", "content": "y" * 20_000}] * 200
    for name in ("chatml", "qwen", "mistral", "deepseek-r1"):
        assert len(ChatTemplate(TEMPLATES[name], time_limit=1).render([*long, *HELLO])) > 8_000_000


def test_many_threads_share_a_template() -> None:
    template = ChatTemplate(TEMPLATES["qwen"])
    want = {i: ChatTemplate(TEMPLATES["qwen"]).render([{"role": "user", "content": str(i)}]) for i in range(8)}
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(30):
            got = template.render([{"role": "user", "content": str(i)}])
            if got != want[i]:
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(i,)) for i in want]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("source,count", [
    ("{{ bos_token }}{{ messages[0].content }}", 1), ("{{ messages[0].content }}", 1),
    ("{{ bos_token }}{{ bos_token }}{{ messages[0].content }}", 1)])
@pytest.mark.parametrize("kind", [bpe_metadata, spm_metadata])
def test_exactly_one_bos(kind: Any, source: str, count: int) -> None:
    data = {**kind(), "tokenizer.chat_template": source}
    tokenizer = Tokenizer.from_metadata(data)
    ids = encode_chat(tokenizer, ChatTemplate.from_metadata(data, tokenizer).render(HELLO))
    assert ids.count(tokenizer.bos_id) == count and ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == "Hello"


def test_no_bos_where_the_model_wants_none() -> None:
    tokenizer = Tokenizer.from_metadata(bpe_metadata("qwen2"))
    ids = encode_chat(tokenizer, ChatTemplate(TEMPLATES["chatml"]).render(HELLO))
    assert tokenizer.bos_id not in ids
    assert tokenizer.token_text(ids[0]) == "<|im_start|>"
    assert encode_chat(tokenizer, "") == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_twice_gives_the_same(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>")
    assert template.render(CHATS[0]) == template.render(CHATS[0])
