"""Rendered chats against transformers, template by template and chat by chat, errors included."""
from __future__ import annotations

from typing import Any

import pytest

from edge_runtime.chat_template import ChatTemplate
from edge_runtime.errors import ChatTemplateError
from tests.chat_templates import CHATS, TEMPLATES, TOOLS

pytestmark = pytest.mark.peers
utils = pytest.importorskip("transformers.utils.chat_template_utils")

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("extra", [{}, {"enable_thinking": False}, {"date_string": "1 May 2025"}])
@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text(name: str, chat: int, extra: dict[str, Any]) -> None:
    template = ChatTemplate(TEMPLATES[name], **TOKENS)
    for tools in (None, TOOLS):
        for prompt in (False, True):
            if tools and "tools" not in template.variables:
                continue
            try:
                want = utils.render_jinja_template(
                    [CHATS[chat]], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=prompt, **TOKENS,
                    **extra)[0][0]
            except Exception:
                with pytest.raises(ChatTemplateError):
                    template.render(CHATS[chat], tools=tools, add_generation_prompt=prompt, **extra)
            else:
                assert template.render(CHATS[chat], tools=tools, add_generation_prompt=prompt, **extra) == want


@pytest.mark.parametrize("expression", [
    "{{ messages | tojson }}", "{{ messages | tojson(indent=2) }}", "{{ messages | tojson(sort_keys=true) }}",
    "{{ {'é': '<>&'} | tojson(ensure_ascii=true) }}", "{{ messages | tojson(separators=(',', ':')) }}",
    "{{ messages | map(attribute='role') | join(', ') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{% set x = dict(a=1, b=[2]) %}{{ x.items() | list }}", "{{ 'a,b'.split(',') | last | upper }}",
    "{{ messages[0].content.strip().startswith('Hi') }}", "{{ '%s-%d' % ('a', 3) }}", "{{ '{:>5}'.format('x') }}",
    "{{ range(3) | list }} {{ [1, 2] + [3] }} {{ 'ab' * 2 }} {{ 7 // 2 }} {{ 2 ** 5 }} {{ 7 % 4 }}",
    "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) ~ m('b') }}", "{{ undefined_name }}|{{ messages[0].nothing }}",
    "{% for k, v in {'a': 1}.items() %}{{ loop.index }}{{ k }}{{ v }}{% endfor %}",
    "{% if messages | selectattr('role', 'equalto', 'nobody') %}yes{% endif %}", "{{ (1, 'a') }} {{ none }} {{ true }}",
    "{% set s %}x{{ 1 }}y{% endset %}{{ s | length }}{{ s | indent(4, true) }}", "{{ 'x' is string and 1 is number }}",
    "  {% if true %}\n  a\n  {% endif %}\n b", "{{ messages | groupby('role') | list | length }}", "{{ 3.0 | int }}",
    "{%- filter upper -%} abc {%- endfilter -%}", "{{ [3, 1, 2] | sort | reverse | list }}", "{{ 'a' in 'abc' }}",
    "{{ 'abc' | replace('b', 'x') | center(9) | truncate(5) }}", "{{ [1, 2, 3] | batch(2, 0) | list }}",
])
def test_same_language(expression: str) -> None:
    want = utils.render_jinja_template([CHATS[1]], chat_template=expression)[0][0]
    assert ChatTemplate(expression).render(CHATS[1], add_generation_prompt=False) == want
