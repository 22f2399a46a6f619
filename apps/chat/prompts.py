"""From a path of messages to what the model is asked: attachments written out, reasoning left out."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edge_runtime.models import bundled

_REASONING = re.compile(r"\s*<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)\s*", re.DOTALL)
_OPENED_BY_TEMPLATE = re.compile(r"\A.*?</think(?:ing)?>\s*", re.DOTALL)
_SUMMARY = re.compile(r"(please |can you |could you )*summar", re.IGNORECASE)


def messages_for_model(path: Sequence[Mapping[str, Any]], texts: Mapping[int, Sequence[Mapping[str, Any]]],
                       system_prompt: str, *, bundled_model: bool) -> list[dict[str, str]]:
    """Chat messages for a path whose last message is the user's, or a reply to go on with. texts: message id ->
    its attachments, each {name, text}."""
    found = [{"role": "system", "content": system_prompt.strip()}] if system_prompt.strip() else []
    for message in path:
        content = message["content"]
        if message["role"] == "user":
            content = user_content(content, texts.get(message["id"], ()), bundled_model)
        elif message is not path[-1]:
            content = without_reasoning(content)
            if not content:  # an empty reply, or one that never came out of its reasoning
                content = "…"
        found.append({"role": message["role"], "content": content})
    return found


def user_content(text: str, attached: Sequence[Mapping[str, Any]], bundled_model: bool) -> str:
    """A message with its attachments before it, which is where models look for what a question is about."""
    if not attached:
        return text
    if bundled_model:  # which was trained on two forms and knows no other
        document = "\n\n".join(one["text"].strip() for one in attached)
        if not text.strip() or _SUMMARY.match(text.strip()):
            return bundled.summarize_prompt(document)
        return bundled.question_prompt(document, text.strip())
    parts = [f'<document name="{one["name"]}">\n{one["text"].strip()}\n</document>' for one in attached]
    return "\n\n".join([*parts, text]) if text.strip() else "\n\n".join(parts)


def without_reasoning(text: str) -> str:
    """A reply without its <think> part, as models expect their earlier replies."""
    cut = _REASONING.sub("", text)
    if re.search(r"</think(?:ing)?>", cut):  # the template had opened it
        cut = _OPENED_BY_TEMPLATE.sub("", cut)
    return cut.strip()
