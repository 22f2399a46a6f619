"""A saved session on disk: JSON header, token ids, KV pages; checked before anything of it is used.

    8 bytes magic, uint32 length of the header, header, CRC-32 of the header (uint32); then what the header describes:
    `tokens` x int32, CRC-32; for each of `pages` pages its bytes and their CRC-32. All little-endian.
"""
from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edge_runtime.chat_template import checked_messages
from edge_runtime.devices.base import KVLayout
from edge_runtime.errors import SessionFileError
from edge_runtime.offload.pages import pages_for

MAGIC = b"EDGEKV1\n"
MAX_HEADER = 64 << 20  # the messages of a conversation are in it


@dataclass(frozen=True)
class Header:
    """fingerprint: of the model; tokens: ids that follow; length: tokens whose KV follows, in ceil(length / 64) pages;
    messages: of a chat; None: running text."""

    fingerprint: str
    layout: KVLayout
    tokens: int
    length: int
    messages: list[dict[str, Any]] | None = None

    @property
    def pages(self) -> int:
        return pages_for(self.length)


def write(path: str | os.PathLike[str], header: Header, tokens: np.ndarray, pages: Iterable[np.ndarray]) -> None:
    """Write a session so that `path` is at every moment the old file or the whole new one. pages: uint8 arrays."""
    import tempfile

    target = Path(path)
    text = json.dumps(asdict(header)).encode()
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(MAGIC + struct.pack("<I", len(text)) + text + _crc(text))
            raw = np.ascontiguousarray(tokens, "<i4").tobytes()
            file.write(raw + _crc(raw))
            for page in pages:
                file.write(page.data)
                file.write(_crc(page.data))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


class Reader:
    """A saved session, opened and checked: `header`, `tokens`, and `read_pages` into memory of the caller's."""

    def __init__(self, path: str | os.PathLike[str], layout: KVLayout, fingerprint: str, vocab_size: int):
        self.path = Path(path)
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # opening a pipe would wait for a writer
                raise SessionFileError(path, "is a folder, a pipe or a device, no saved session")
            self._file: BinaryIO = open(self.path, "rb")  # noqa: SIM115 - closed by close()
        except SessionFileError:
            raise
        except ValueError as error:  # a NUL in the path
            raise SessionFileError(repr(path), "is no file name") from error
        except OSError as error:
            raise SessionFileError(path, f"cannot be opened: {error.strerror}") from error
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self.header = self._read_header()
            self._check_model(layout, fingerprint)
            raw = self._checked(4 * self.header.tokens, "the token ids")
            self.tokens = np.frombuffer(raw, "<i4").astype(np.int32)
            if len(self.tokens) and not (self.tokens.min() >= 0 and self.tokens.max() < vocab_size):
                raise SessionFileError(path, "holds token ids outside the model's vocabulary")
        except BaseException:
            self.close()
            raise

    def read_pages(self, target: Callable[[int], np.ndarray]) -> None:
        """Read page i into `target(i)`, uint8 [page_bytes], for all pages."""
        for index in range(self.header.pages):
            memory = target(index)
            if self._file.readinto(memory.data) != memory.nbytes:  # type: ignore[attr-defined]
                raise SessionFileError(self.path, f"ends within page {index}")
            self._check(memory.data, f"page {index}")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_header(self) -> Header:
        start = self._file.read(len(MAGIC) + 4)
        if start.startswith(MAGIC[:6]) and not start.startswith(MAGIC):
            raise SessionFileError(self.path, "was saved by another version of this package, in a format that is not "
                                              "read here")
        if len(start) < len(MAGIC) + 4 or not start.startswith(MAGIC):
            raise SessionFileError(self.path, "is no saved session")
        length = struct.unpack("<I", start[len(MAGIC):])[0]
        if length > min(MAX_HEADER, self._size):
            raise SessionFileError(self.path, f"has a header of {length} bytes in a file of {self._size}")
        try:
            values = json.loads(self._checked(length, "the header"))
            layout = KVLayout(**values.pop("layout"))
            header = Header(layout=layout, **values)
            whole: Sequence[Any] = (header.tokens, header.length, layout.layers, layout.kv_heads, layout.head_size)
            if not all(isinstance(n, int) and not isinstance(n, bool) for n in whole):
                raise TypeError("a number is missing")
            if header.messages is not None and header.messages != []:
                checked_messages(header.messages)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SessionFileError(self.path, f"has a broken header ({error})") from error
        if not 0 <= header.length <= header.tokens:
            raise SessionFileError(self.path, f"claims KV of {header.length} tokens for {header.tokens}")
        expected = len(start) + length + 4 + 4 * header.tokens + 4 + header.pages * (layout.page_bytes + 4)
        if expected != self._size:
            raise SessionFileError(self.path, f"is cut off or padded: {self._size} bytes, {expected} expected")
        return header

    def _check_model(self, layout: KVLayout, fingerprint: str) -> None:
        if self.header.fingerprint != fingerprint:
            raise SessionFileError(self.path, "was saved with another model. Open that model to load it")
        if self.header.layout != layout:
            raise SessionFileError(self.path, f"holds KV as {self.header.layout}, the model was opened with {layout}. "
                                              f"Open it with kv={self.header.layout.dtype!r}")

    def _checked(self, count: int, what: str) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise SessionFileError(self.path, f"ends within {what}")
        self._check(data, what)
        return data

    def _check(self, data: bytes | memoryview, what: str) -> None:
        if self._file.read(4) != _crc(data):
            raise SessionFileError(self.path, f"is corrupt: the checksum of {what} does not match")


def _crc(data: bytes | memoryview) -> bytes:
    return struct.pack("<I", zlib.crc32(data))
