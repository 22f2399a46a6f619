"""Tool calls in a reply while it is written: text passes through, calls become deltas as their JSON comes."""
from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.apps.server.tool_formats import ToolFormat
    from edge_runtime.outcome import Chunk, Reply
    from edge_runtime.tokenizer import Tokenizer

PYTHON_TAG = "<|python_tag|>"


class ToolParser:
    """Fed with chunks, gives chat-completion deltas: {"content"} and {"tool_calls"}. What looked like a call and is
    none (no JSON, no known name) comes out as text. calls: those found so far."""

    def __init__(self, form: ToolFormat, names: frozenset[str], parallel: bool, tokenizer: Tokenizer):
        self.form, self.names, self.parallel, self.tokenizer = form, names, parallel, tokenizer
        self.calls = 0
        self._held = ""  # text that may be the beginning of a mark, or is still to be read
        self._scanner: CallScanner | None = None
        self._raw = ""  # of the call being read, while it may still turn out to be none
        self._began = False  # anything but space came already
        self._after = False  # behind a call: space between calls and closing marks is no text

    def push(self, piece: Chunk | Reply) -> list[dict[str, Any]]:
        self._held += self._with_mark(piece)
        deltas = self._read()
        if piece.finish_reason is not None:
            deltas += self._end()
        return _joined(deltas)

    def _with_mark(self, piece: Chunk | Reply) -> str:
        """The piece's text, with a special token that opens calls written out."""
        mark = self.form.opening_id
        if mark is None or mark not in piece.token_ids:
            return piece.text
        text, ids = "", list(piece.token_ids)
        rest = piece.text
        while mark in ids:
            at = ids.index(mark)
            after = self.tokenizer.decode(ids[at + 1:], start=False)
            cut = len(rest) - len(after) if rest.endswith(after) else 0
            text += rest[:cut] + self.form.opening
            rest, ids = rest[cut:], ids[at + 1:]
        return text + rest

    def _read(self) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        while self._held:
            before = len(self._held), self._scanner
            out += self._text() if self._scanner is None else self._call()
            if (len(self._held), self._scanner) == before:
                break
        return out

    def _text(self) -> list[dict[str, Any]]:
        """Text up to the next mark."""
        if self._after:
            self._held = self._held.lstrip()
            closing = self.form.closing
            if closing and self._held.startswith(closing):
                self._held, self._after = self._held[len(closing):].lstrip(), True
            elif self._held and self._held[0] in ",;]" and (self.form.array or not self.form.opening):
                self._held = self._held[1:]
                return []
            elif self._held.startswith("{") and (self.form.array or not self.form.opening):
                self._open("")
                return []
            elif not self._held or (closing and closing.startswith(self._held)):
                return []
            else:
                self._after = False
        if not self.form.opening:
            return self._bare()
        at = self._held.find(self.form.opening)
        if at >= 0:
            text, self._held = self._held[:at].rstrip(), self._held[at + len(self.form.opening):]
            self._open(self.form.opening)
            return [{"content": text}] if text else []
        # Space before a call belongs to the format: it waits with what may be the mark's beginning.
        end = len(self._held[:len(self._held) - overlap(self._held, self.form.opening)].rstrip())
        text, self._held = self._held[:end], self._held[end:]
        return [{"content": text}] if text else []

    def _bare(self) -> list[dict[str, Any]]:
        """A reply that is a call begins with its brace."""
        if not self._began:
            start = self._held.lstrip()
            start = start.removeprefix(PYTHON_TAG).lstrip() if start.startswith(PYTHON_TAG) else start
            if not start or PYTHON_TAG.startswith(start):
                return []
            self._began = True
            if start.startswith("{"):
                self._held = start
                self._open("")
                return []
        text, self._held = self._held, ""
        return [{"content": text}]

    def _open(self, mark: str) -> None:
        self._scanner, self._raw, self._began = CallScanner(self.form.arguments), mark, True

    def _call(self) -> list[dict[str, Any]]:
        scanner = self._scanner
        assert scanner is not None
        used = scanner.push(self._held)
        self._raw, self._held = self._raw + self._held[:used], self._held[used:]
        out: list[dict[str, Any]] = []
        if not scanner.announced and scanner.name is not None:
            if scanner.name not in self.names:
                scanner.failed = True
            else:
                scanner.announced = True
                if self.parallel or not self.calls:
                    self.calls += 1
                    out.append({"tool_calls": [{
                        "index": self.calls - 1, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                        "function": {"name": scanner.name, "arguments": ""}}]})
                else:
                    scanner.dropped = True
        if scanner.failed and not scanner.announced:
            text, self._raw, self._scanner, self._after = self._raw, "", None, False
            return [{"content": text}]
        if scanner.announced and not scanner.dropped:
            arguments = scanner.take()
            if arguments:
                out.append({"tool_calls": [{"index": self.calls - 1, "function": {"arguments": arguments}}]})
        if scanner.ended or scanner.failed:
            if scanner.announced:
                self._scanner, self._raw, self._after = None, "", True
            else:
                text, self._raw, self._scanner = self._raw, "", None
                out.append({"content": text})
        return out

    def _end(self) -> list[dict[str, Any]]:
        """What is still held, when nothing more comes."""
        out: list[dict[str, Any]] = []
        if self._scanner is not None and not self._scanner.announced:
            out.append({"content": self._raw})
        elif self._held and not self._after:
            out.append({"content": self._held})
        self._held = ""
        return out


class CallScanner:
    """One call's JSON object, character by character: its name as soon as it is whole, its arguments as they come.

    Also the form NAME[ARGS]{...}, in which the name stands before the object that is the arguments.
    """

    def __init__(self, arguments: str):
        self._keys = ("arguments", "parameters") if arguments in ("arguments", "parameters") else (arguments,)
        self.name: str | None = None
        self.announced = self.ended = self.failed = self.dropped = False
        self._depth = 0
        self._string = self._escape = False
        self._text = ""  # of the string or scalar being read at the call's own level
        self._key: str | None = None
        self._value = False  # behind the colon
        self._arguments: list[str] = []
        self._lead = ""  # before the object
        self._plain = False  # the object is the arguments themselves

    def push(self, text: str) -> int:
        """Reads up to the end of the call; returns how many characters that was."""
        for i, char in enumerate(text):
            self._char(char)
            if self.ended or self.failed:
                return i + 1
        return len(text)

    def take(self) -> str:
        """Arguments that came since the last time, as they were written."""
        text = "".join(self._arguments)
        if text.startswith('"') and not self._plain:  # arguments written as a string of JSON
            if not self.ended:
                return ""
            with contextlib.suppress(ValueError):
                text = str(json.loads(text))
        self._arguments.clear()
        return text

    def _char(self, char: str) -> None:
        if not self._depth:
            self._before(char)
            return
        taking = self._plain or (self._value and self._key in self._keys)
        if self._string:
            self._in_string(char, taking)
        elif char == '"':
            self._string, self._text = True, char
            if taking:
                self._arguments.append(char)
        elif char in "{[":
            self._depth += 1
            if taking:
                self._arguments.append(char)
        elif char in "}]":
            self._depth -= 1
            if taking and (self._depth or self._plain):
                self._arguments.append(char)
            self.ended = not self._depth
            if self.ended and self.name is None:
                self.failed = True
        elif self._depth == 1 and not self._plain and char in ":,":
            self._value = char == ":"
            if char == ",":
                self._key = None
        elif taking and not (self._depth == 1 and char.isspace() and not self._plain):
            self._arguments.append(char)

    def _before(self, char: str) -> None:
        if char == "{":
            self._depth = 1
            lead = self._lead.strip().removesuffix("[ARGS]").strip()
            if lead:
                self.name, self._plain = lead, True
                self._arguments.append(char)
        elif char == "[" and not self._lead.strip():
            pass  # a list of calls begins
        elif len(self._lead) > 128:
            self.failed = True
        else:
            self._lead += char

    def _in_string(self, char: str, taking: bool) -> None:
        if taking:
            self._arguments.append(char)
        elif self._depth == 1:
            self._text += char
        if self._escape:
            self._escape = False
        elif char == "\\":
            self._escape = True
        elif char == '"':
            self._string = False
            if self._depth == 1 and not taking:
                self._close_string()

    def _close_string(self) -> None:
        try:
            text = json.loads(self._text)
        except ValueError:
            self.failed = True
            return
        if not self._value:
            self._key = text
        elif self._key == "name":
            self.name = text


def overlap(text: str, mark: str) -> int:
    """Characters at the end of `text` that may begin `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)


def _joined(deltas: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring deltas of one kind as one."""
    out: list[dict[str, Any]] = []
    for delta in deltas:
        if out and "content" in delta and "content" in out[-1]:
            out[-1] = {"content": out[-1]["content"] + delta["content"]}
        elif out and "tool_calls" in delta and "tool_calls" in out[-1] and "id" not in delta["tool_calls"][0]:
            last = out[-1]["tool_calls"][0]
            arguments = last["function"]["arguments"] + delta["tool_calls"][0]["function"]["arguments"]
            out[-1] = {"tool_calls": [{**last, "function": {**last["function"], "arguments": arguments}}]}
        else:
            out.append(delta)
    return out
