"""Messages as OpenAI's API has them, to what chat templates read."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from edge_runtime.apps.server.errors import ApiError

if TYPE_CHECKING:
    from edge_runtime.apps.server.tool_formats import ToolUse
    from edge_runtime.llm import LLM


def rendered_messages(llm: LLM, messages: Sequence[Mapping[str, Any]], tools: ToolUse | None) -> list[dict[str, Any]]:
    """Copies for the template: arguments of calls as objects, `developer` as `system` where the template knows no such
    role; a template that knows no tools gets them, calls and results as text."""
    template = llm.chat_template
    source = "" if template is None else template.named.get("tool_use", template).source if tools else template.source
    out = [_plain(message, "developer" in source) for message in messages]
    if "tool_calls" not in source:
        out = [_call_as_text(message) for message in out]
    if tools is not None and tools.instructions:
        if out and out[0]["role"] == "system":
            out[0] = {**out[0], "content": f"{_text(out[0]['content'])}\n\n{tools.instructions}"}
        else:
            out.insert(0, {"role": "system", "content": tools.instructions})
    return out


def _plain(message: Mapping[str, Any], developer: bool) -> dict[str, Any]:
    out = {key: value for key, value in message.items() if value is not None}
    if out["role"] == "developer" and not developer:
        out["role"] = "system"
    out["content"] = _parts(message.get("content"))
    calls = message.get("tool_calls")
    if calls:
        out["tool_calls"] = [_call(call, i) for i, call in enumerate(calls)]
    else:
        out.pop("tool_calls", None)
    return out


def _parts(content: Any) -> Any:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part["text"]} for part in content]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _call(call: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Templates print the arguments as JSON themselves, from an object."""
    function = call["function"]
    try:
        arguments = orjson.loads(function["arguments"] or "{}")
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The arguments of tool call {index} are no JSON: {error}.", param="messages",
                       code="invalid_value") from None
    return {"id": call.get("id") or f"call_{index}", "type": "function",
            "function": {"name": function["name"], "arguments": arguments}}


def _call_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_text(message['content'])}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    calls = "\n".join(f"<tool_call>\n{orjson.dumps(call['function']).decode()}\n</tool_call>"
                      for call in message["tool_calls"])
    text = _text(message["content"])
    return {"role": "assistant", "content": f"{text}\n{calls}" if text else calls}
