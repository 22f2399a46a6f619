"""The events of one streamed response: items open, grow and close, each event numbered."""
from __future__ import annotations

import uuid
from typing import Any

from edge_runtime.apps.server.io import event


class ResponseEvents:
    """Turns chat-completion deltas into the events of /v1/responses. output: the items so far; methods return bytes."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._number = 0

    def response(self, name: str, response: dict[str, Any]) -> bytes:
        return self._event(name, response=response)

    def delta(self, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None) -> bytes:
        if "content" in delta:
            return self._text(delta["content"], logprobs or [])
        return b"".join([self._call(part) for part in delta["tool_calls"]])

    def end(self, reason: str) -> bytes:
        """Close what is open; a reply without a word is one empty message."""
        out = b"" if self.output else self._text("", [])
        return out + self._close("incomplete" if reason == "length" else "completed")

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        out = b""
        if self._open is None or self._open["type"] != "message":
            out = self._close("completed")
            item: dict[str, Any] = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "status": "in_progress",
                                    "role": "assistant", "content": []}
            out += self._add(item)
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            out += self._event("response.content_part.added", item_id=item["id"], output_index=len(self.output) - 1,
                               content_index=0, part=part)
            item["content"] = [{**part, "logprobs": []}]
        assert self._open is not None
        grown = self._open["content"][0]
        grown["text"] += text
        grown["logprobs"] += logprobs
        if not text and not logprobs:
            return out
        return out + self._event("response.output_text.delta", item_id=self._open["id"],
                                 output_index=len(self.output) - 1, content_index=0, delta=text, logprobs=logprobs)

    def _call(self, part: dict[str, Any]) -> bytes:
        function = part["function"]
        out = b""
        if "id" in part:
            out = self._close("completed")
            out += self._add({"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress",
                              "call_id": part["id"], "name": function["name"], "arguments": ""})
        assert self._open is not None
        if function["arguments"]:
            self._open["arguments"] += function["arguments"]
            out += self._event("response.function_call_arguments.delta", item_id=self._open["id"],
                               output_index=len(self.output) - 1, delta=function["arguments"])
        return out

    def _add(self, item: dict[str, Any]) -> bytes:
        self.output.append(item)
        self._open = item
        return self._event("response.output_item.added", output_index=len(self.output) - 1, item=item)

    def _close(self, status: str) -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        where = {"item_id": item["id"], "output_index": len(self.output) - 1}
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            out = self._event("response.output_text.done", **where, content_index=0, text=part["text"],
                              logprobs=part["logprobs"])
            out += self._event("response.content_part.done", **where, content_index=0, part=part)
        else:
            out = self._event("response.function_call_arguments.done", **where, name=item["name"],
                              arguments=item["arguments"])
        return out + self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)
