"""The user's own text as rows of one context each: what a teacher is asked and a student trained on."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from edge_runtime.errors import InvalidRequestError

SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class TextRows:
    """Rows of `context` tokens that cover a text; each token but the first is the target of exactly one position.

    tokens: int32 [N], N > context. Rows follow each other without a gap; the last one begins early enough to be whole,
    and its positions that the row before covers already carry no weight.
    """

    tokens: np.ndarray
    context: int

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.context)

    def start(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return min(row * self.context, len(self.tokens) - 1 - self.context)

    def inputs(self, row: int) -> np.ndarray:
        """int32 [context]."""
        start = self.start(row)
        return self.tokens[start : start + self.context]

    def targets(self, row: int) -> np.ndarray:
        """The tokens that follow each input, int32 [context]."""
        start = self.start(row) + 1
        return self.tokens[start : start + self.context]

    def weights(self, row: int) -> np.ndarray:
        """float32 [context]: 0 where the row before covers the position too, else 1."""
        covered = row * self.context - self.start(row)
        return (np.arange(self.context) >= covered).astype(np.float32)

    @property
    def digest(self) -> str:
        return blake2b(np.ascontiguousarray(self.tokens, "<i4").tobytes(), digest_size=16).hexdigest()

    def split(self, held_out: float) -> tuple[range, range]:
        """(rows to train on, rows held out): the last share of the text, one row at least where the share is above 0
        and there are two."""
        count = len(self)
        kept = min(count - 1, max(1, round(count * held_out))) if held_out > 0 and count > 1 else 0
        return range(count - kept), range(count - kept, count)


def find_texts(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Files as given, and those of the folders (.txt, .md, .jsonl; sorted, hidden ones left out).

    InvalidRequestError: no path, one that is not there, or a folder without texts.
    """
    if not paths:
        raise InvalidRequestError("text", list(paths), "at least one file or folder of .txt, .md or .jsonl files")
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
                            and not any(part.startswith(".") for part in p.relative_to(path).parts))
            if not inside:
                raise InvalidRequestError("text", str(path), f"a folder that holds {', '.join(SUFFIXES)} files")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InvalidRequestError("text", str(path), "a file or folder that exists")
    return found


def read_texts(path: Path) -> list[str]:
    """A file's text, or one text per line of a .jsonl file (strings, or objects with a string under "text").

    InvalidRequestError names the line or byte that is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequestError("text", str(path), f"UTF-8; byte {error.start} is not") from error
    if path.suffix.lower() != ".jsonl":
        return [text]
    texts = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines cuts at U+2028 too
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InvalidRequestError("text", f"{path}, line {number}", f"JSON ({error})") from error
        value = value.get("text") if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise InvalidRequestError("text", f"{path}, line {number}", 'a string, or an object with a string "text"')
        texts.append(value)
    return texts


def text_rows(texts: Iterable[str], encode: Callable[[str], Sequence[int]], end: int | None, context: int) -> TextRows:
    """The texts' tokens one after the other, each followed by `end` where there is one, as rows.

    InvalidRequestError: together they are shorter than one context and the token after it.
    """
    pieces = []
    for text in texts:
        if not text.strip():
            continue
        ids = list(encode(text))
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        pieces.append(np.asarray(ids, np.int32))
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    if len(tokens) <= context:
        raise InvalidRequestError("text", f"{len(tokens)} tokens", f"longer than one context of {context} tokens: add "
                                                                   f"text, or lower training.context")
    return TextRows(tokens, context)
