"""A teacher's largest logits at every position of a text, on disk, so that it runs once however long a student trains.

A folder holds `manifest.json`, `tokens.i32` and `logits.bin`. The last has one record per row of `context` positions:

    ids     [context, k]  the tokens of the k largest logits, largest first: uint16, or uint32 above 65,536 tokens
    values  [context, k]  their logits less the largest: float16, resolution 1e-3 where probabilities above 1 % lie
    rest    [t, context]  logsumexp of the other logits less the largest, over each of the t temperatures: float32
    crc32   uint32        of the record

so a token takes k * (2 or 4) + k * 2 + t * 4 bytes: 264 for k = 64, a vocabulary up to 65,536 and two temperatures.
Records are appended; after a kill the whole ones are kept and the next run goes on behind them.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edge_runtime.errors import CorruptModelError, InvalidRequestError, NumericalError

from .text_rows import TextRows

VERSION = 1
SYNC_SECONDS = 10.0
LEAST = np.float32(-6e4)  # a logit below the largest that float16 holds
MANIFEST, TOKENS, LOGITS = "manifest.json", "tokens.i32", "logits.bin"

# Token ids int32 [T] in; their logits float32 [n, V] out in order, in pieces that may be overwritten by the next.
Teacher = Callable[[np.ndarray], Iterable[np.ndarray]]
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Manifest:
    """What a cache is of. teacher, tokenizer, text: fingerprints; tokens: of the text; temperatures: ascending."""

    teacher: str
    tokenizer: str
    text: str
    tokens: int
    vocab_size: int
    context: int
    top_k: int
    temperatures: tuple[float, ...]
    version: int = VERSION

    @property
    def id_type(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @property
    def bytes_per_token(self) -> int:
        return self.top_k * (self.id_type.itemsize + 2) + 4 * len(self.temperatures)

    @property
    def record_bytes(self) -> int:
        return self.context * self.bytes_per_token + 4

    @property
    def rows(self) -> int:
        return -(-(self.tokens - 1) // self.context)

    @property
    def file_bytes(self) -> int:
        """Of the whole `logits.bin`."""
        return self.rows * self.record_bytes


@dataclass(frozen=True)
class TopLogits:
    """A row's. ids: int64 [T, k]; values: float32 [T, k], logits less the largest; rest: float32 [T], logsumexp of the
    others over the temperature asked for."""

    ids: np.ndarray
    values: np.ndarray
    rest: np.ndarray


class LogitCache:
    """The cache in `folder`, made or gone on with.

    InvalidRequestError: the folder holds the cache of another teacher, tokenizer, text or setting (named). Raises
    CorruptModelError where a record does not match its checksum.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest, rows: TextRows):
        self.folder, self.manifest, self.text = Path(folder), manifest, rows
        if not 1 <= manifest.top_k <= manifest.vocab_size:
            raise InvalidRequestError("top_k", manifest.top_k, f"1 to {manifest.vocab_size}, the vocabulary's size")
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self.folder / MANIFEST
        before = _read_manifest(found) if found.exists() else None
        if before and self.path.exists() and self.path.stat().st_size >= before.record_bytes:
            self._compare(before)
        else:  # nothing, or nothing worth keeping
            (self.folder / TOKENS).write_bytes(rows.tokens.astype("<i4").tobytes())
            (self.folder / LOGITS).unlink(missing_ok=True)
            write_json(found, dataclasses.asdict(manifest))
        self._map: np.memmap | None = None

    @property
    def path(self) -> Path:
        return self.folder / LOGITS

    @property
    def rows_done(self) -> int:
        """Whole records on disk."""
        size = self.path.stat().st_size if self.path.exists() else 0
        return min(size // self.manifest.record_bytes, self.manifest.rows)

    @property
    def complete(self) -> bool:
        return self.rows_done == self.manifest.rows

    def fill(self, teacher: Teacher, progress: Progress | None = None) -> int:
        """Asks the teacher about every row that is missing; returns how many that were. progress: (rows done, all).

        OSError (a full disk): what is whole stays, and a later call goes on.
        """
        first, total = self.rows_done, self.manifest.rows
        self._map = None
        with open(self.path, "ab") as file:
            file.truncate(first * self.manifest.record_bytes)
            synced = time.monotonic()
            for row in range(first, total):
                self._append(file, self._record(teacher(self.text.inputs(row))))
                if time.monotonic() - synced > SYNC_SECONDS:
                    file.flush()
                    os.fsync(file.fileno())
                    synced = time.monotonic()
                if progress:
                    progress(row + 1, total)
            file.flush()
            os.fsync(file.fileno())
        return total - first

    def _append(self, file: BinaryIO, record: bytes) -> None:
        file.write(record)
        file.flush()  # a kill then loses the row in work, no more

    def row(self, row: int, temperature: float) -> TopLogits:
        """The record of a row. InvalidRequestError for a temperature that is not in the manifest."""
        m = self.manifest
        if temperature not in m.temperatures:
            raise InvalidRequestError("temperature", temperature, f"one of the cache's: {m.temperatures}")
        if self._map is None:
            self._map = np.memmap(self.path, np.uint8, "r")
        raw = self._map[row * m.record_bytes : (row + 1) * m.record_bytes]
        if len(raw) < m.record_bytes or zlib.crc32(raw[:-4].tobytes()) != int.from_bytes(raw[-4:].tobytes(), "little"):
            raise CorruptModelError(self.path, row * m.record_bytes, f"the record of row {row} does not match its "
                                                                     f"checksum (without the folder it is made anew)")
        ids_end = m.context * m.top_k * m.id_type.itemsize
        values_end = ids_end + m.context * m.top_k * 2
        ids = raw[:ids_end].view(m.id_type).reshape(m.context, m.top_k)
        values = raw[ids_end:values_end].view("<f2").reshape(m.context, m.top_k)
        rest = raw[values_end:-4].view("<f4").reshape(len(m.temperatures), m.context)
        return TopLogits(ids.astype(np.int64), values.astype(np.float32),
                         rest[m.temperatures.index(temperature)].astype(np.float32))

    def _record(self, pieces: Iterable[np.ndarray]) -> bytes:
        m = self.manifest
        ids, values = np.empty((m.context, m.top_k), m.id_type), np.empty((m.context, m.top_k), "<f2")
        rest = np.empty((len(m.temperatures), m.context), "<f4")
        at = 0
        for logits in pieces:
            here = slice(at, at + len(logits))
            ids[here], largest, rest[:, here] = top_logits(logits, m.top_k, m.temperatures)
            values[here] = np.maximum(largest, LEAST)
            at += len(logits)
        if at != m.context:
            raise ValueError(f"the teacher gave {at} rows of logits for {m.context} tokens")
        body = ids.tobytes() + values.tobytes() + rest.tobytes()
        return body + zlib.crc32(body).to_bytes(4, "little")

    def _compare(self, found: Manifest) -> None:
        for field in dataclasses.fields(Manifest):
            theirs, ours = getattr(found, field.name), getattr(self.manifest, field.name)
            if theirs != ours:
                raise InvalidRequestError("cache", str(self.folder), f"a folder for this run's {field.name} ({ours}): "
                                          f"it holds logits of another ({theirs}). Delete it or name another folder")


def top_logits(logits: np.ndarray, k: int, temperatures: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """Of float32 [n, V]: ids [n, k] of the largest, largest first; their values less the largest, float32 [n, k]; and
    logsumexp of the rest less the largest over each temperature, float32 [t, n], -inf where nothing is left.

    NumericalError for logits that are not finite, but for -inf, which some models give to tokens that never come.
    """
    n = len(logits)
    largest = logits.max(axis=1)  # NaN, where there is one
    if not np.isfinite(largest).all():
        raise NumericalError("the teacher's logits are not finite: its weights or its text are damaged")
    ids, values = np.empty((n, k), np.int64), np.empty((n, k), np.float32)
    rest = np.empty((len(temperatures), n), np.float32)
    with np.errstate(divide="ignore"):  # log of nothing
        for i, row in enumerate(logits):  # one at a time: a row of 150,000 stays in the L2 cache
            ids[i] = _largest(row, k)
            shifted = row - largest[i]
            values[i] = shifted[ids[i]]
            shifted[ids[i]] = -np.inf
            for j, temperature in enumerate(temperatures):
                rest[j, i] = np.log(np.exp(shifted / np.float32(temperature)).sum())
    return ids, values, rest


def _largest(row: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of a row, largest first, the leftmost among equals."""
    blocks = 2 * k
    if len(row) < 8 * blocks:
        return np.argsort(-row, kind="stable")[:k]
    # The k-th largest of the blocks' maxima is at most the k-th largest of all: few values reach it, and one comparison
    # of each finds them, several times as fast as a partition of 150,000.
    width = len(row) // blocks
    maxima = row[: blocks * width].reshape(blocks, width).max(axis=1)
    found = np.flatnonzero(row >= np.partition(maxima, blocks - k)[blocks - k])
    return found[np.argsort(-row[found], kind="stable")[:k]]


def _read_manifest(path: Path) -> Manifest:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = Manifest(**{**values, "temperatures": tuple(map(float, values["temperatures"]))})
        for name in ("tokens", "vocab_size", "context", "top_k", "version"):
            if not isinstance(getattr(found, name), int):
                raise TypeError(f"{name} is {getattr(found, name)!r}")
        return found
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptModelError(path, 0, f"no manifest of a logit cache ({error})") from error


def write_json(path: Path, values: object) -> None:
    """Writes beside and renames: a kill or a full disk (OSError) leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
