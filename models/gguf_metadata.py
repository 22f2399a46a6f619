"""The key-value section of a GGUF file: scalars read at once, arrays located and read on first access.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing in the file is trusted: every length is
compared with the bytes that are left before anything is walked or allocated.
"""
from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from edge_runtime.errors import CorruptModelError

# Bounds on what a header may ask for. The largest real files hold about 60 keys, 1,200 tensors and 800,000 strings
# (a vocabulary and its merges), and arrays of 10 MB.
MAX_KEYS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1
MAX_STRING_BYTES = 1 << 24
MAX_ARRAY_BYTES = 1 << 26
MAX_STRINGS = 1 << 22  # of all string arrays together: they are walked when the file is opened
MAX_NESTED_ARRAYS = 1 << 12
MAX_DEPTH = 4
EAGER_STRING_BYTES = 1 << 16
MAX_EAGER_BYTES = 1 << 26  # of all names and texts that are read when the file is opened

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: dict[int, tuple[struct.Struct, np.dtype[Any]]] = {
    number: (struct.Struct("<" + code), np.dtype(dtype))
    for number, code, dtype in (
        (0, "B", "u1"), (1, "b", "i1"), (2, "H", "<u2"), (3, "h", "<i2"), (4, "I", "<u4"), (5, "i", "<i4"),
        (6, "f", "<f4"), (7, "B", "u1"), (10, "Q", "<u8"), (11, "q", "<i8"), (12, "d", "<f8"),
    )
}  # fmt: skip
TYPE_NAMES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array", "uint64",
              "int64", "float64")  # fmt: skip
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class Cursor:
    """A bounds-checked walk over the mapped file. `at` is the byte that is read next."""

    def __init__(self, buffer: Any, size: int, path: object, at: int = 0):
        self.buffer, self.size, self.path, self.at = buffer, size, path, at
        self.strings_left, self.nested_left, self.eager_left = MAX_STRINGS, MAX_NESTED_ARRAYS, MAX_EAGER_BYTES

    @property
    def left(self) -> int:
        return self.size - self.at

    def corrupt(self, offset: int, reason: str) -> NoReturn:
        raise CorruptModelError(self.path, offset, reason)

    def need(self, count: int, what: str) -> None:
        if count > self.left:
            self.corrupt(self.at, f"{what} needs {count} bytes, the file ends after {self.left}")

    def unpack(self, form: struct.Struct, what: str) -> Any:
        self.need(form.size, what)
        (value,) = form.unpack_from(self.buffer, self.at)
        self.at += form.size
        return value

    def u32(self, what: str) -> int:
        return self.unpack(_U32, what)

    def u64(self, what: str) -> int:
        return self.unpack(_U64, what)

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.at += count

    def string_length(self, what: str, limit: int) -> int:
        start = self.at
        length = self.u64(f"the length of {what}")
        if length > self.left:
            self.corrupt(start, f"{what} is {length} bytes long, the file has {self.left} left")
        if length > limit:
            self.corrupt(start, f"{what} is {length} bytes long, the limit is {limit}")
        return length

    def string(self, what: str, limit: int) -> str:
        start = self.at
        length = self.string_length(what, limit)
        self.eager_left -= length
        if self.eager_left < 0:
            self.corrupt(start, f"names and texts exceed {MAX_EAGER_BYTES} bytes")
        raw = bytes(self.buffer[self.at : self.at + length])
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.corrupt(self.at + error.start, f"{what} is not UTF-8")
        self.at += length
        return text


@dataclass(frozen=True)
class Located:
    """A value that was skipped over. start: its first byte, after an array's element type and count, or a string's
    length; count: elements, or bytes of a string."""

    type: int
    element_type: int
    count: int
    start: int
    end: int


class Metadata(Mapping[str, Any]):
    """Keys to values: scalars as Python values, numeric arrays as read-only NumPy arrays, string arrays as lists.

    Arrays are read from the file on first access and kept. CorruptModelError where their content breaks the format.
    """

    def __init__(self, path: object, buffer: Any, size: int):
        self._path, self._buffer, self._size = path, buffer, size
        self._values: dict[str, Any] = {}
        self._offsets: dict[str, int] = {}
        self._types: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self.end = 0

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, Located):
            value = self._values[key] = self._read(key, value)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def offset(self, key: str) -> int:
        """The byte where the value of `key` begins; the end of the section for a key that is missing."""
        return self._offsets.get(key, self.end)

    def type_name(self, key: str) -> str:
        """The type the file declares: "uint32", "string", "array" ..."""
        return TYPE_NAMES[self._types[key]]

    def length(self, key: str) -> int:
        """Elements of an array or characters of a string, without reading the array."""
        value = self._values[key]
        return value.count if isinstance(value, Located) else len(value)

    def raw(self, key: str) -> bytes:
        """The value as the file holds it: its type number, then its bytes."""
        if self._buffer is None:
            raise ValueError(f"{self._path} is closed")
        return bytes(self._buffer[self._offsets[key] - 4 : self._ends[key]])

    def _read(self, key: str, value: Located) -> Any:
        if self._buffer is None:
            raise ValueError(f"{self._path} is closed: {key} was not read before")
        cursor = Cursor(self._buffer, self._size, self._path, value.start)
        if value.type == STRING:
            cursor.at -= 8
            return cursor.string(key, MAX_STRING_BYTES)
        return _read_array(cursor, value, key)

    def detach(self) -> None:
        """Lets go of the file. What was read stays."""
        self._buffer = None


def read_metadata(cursor: Cursor, count: int) -> Metadata:
    """Walks `count` pairs at the cursor, which stands behind them afterwards."""
    metadata = Metadata(cursor.path, cursor.buffer, cursor.size)
    for index in range(count):
        start = cursor.at
        key = cursor.string(f"metadata key {index}", MAX_KEY_BYTES)
        if not key:
            cursor.corrupt(start, f"metadata key {index} is empty")
        if key in metadata:
            cursor.corrupt(start, f"metadata key {_shown(key)} appears twice")
        type_at = cursor.at
        number = cursor.u32(f"the type of {_shown(key)}")
        if number >= len(TYPE_NAMES):
            cursor.corrupt(type_at, f"metadata key {_shown(key)} has the unknown value type {number}")
        metadata._offsets[key] = cursor.at
        metadata._types[key] = number
        metadata._values[key] = _value(cursor, number, _shown(key))
        metadata._ends[key] = cursor.at
    metadata.end = cursor.at
    return metadata


def _shown(key: str) -> str:
    return repr(key if len(key) <= 64 else key[:61] + "...")


def _value(cursor: Cursor, number: int, what: str) -> Any:
    if number == ARRAY:
        return _locate_array(cursor, what, 1)
    if number == STRING:
        start = cursor.at
        length = cursor.string_length(what, MAX_STRING_BYTES)
        if length > EAGER_STRING_BYTES:
            cursor.at += length
            return Located(STRING, STRING, length, start + 8, cursor.at)
        cursor.at = start
        return cursor.string(what, MAX_STRING_BYTES)
    start = cursor.at
    value = cursor.unpack(SCALARS[number][0], what)
    if number == BOOL:
        if value > 1:
            cursor.corrupt(start, f"{what} is a bool with the value {value}")
        return bool(value)
    return value


def _locate_array(cursor: Cursor, what: str, depth: int) -> Located:
    """Steps over an array, checking that it ends within the file and within the limits."""
    type_at = cursor.at
    element = cursor.u32(f"the element type of {what}")
    count_at = cursor.at
    count = cursor.u64(f"the element count of {what}")
    start = cursor.at
    if element >= len(TYPE_NAMES):
        cursor.corrupt(type_at, f"{what} is an array of the unknown type {element}")
    least = 12 if element == ARRAY else 8 if element == STRING else SCALARS[element][0].size
    if count > cursor.left // least:
        cursor.corrupt(count_at, f"{what} claims {count} elements, the file has {cursor.left} bytes left")
    if count * least > MAX_ARRAY_BYTES:
        cursor.corrupt(count_at, f"{what} claims {count} elements, the limit is {MAX_ARRAY_BYTES // least}")
    if element == STRING:
        cursor.strings_left -= count
        if cursor.strings_left < 0:
            cursor.corrupt(count_at, f"the metadata holds more than {MAX_STRINGS} strings")
        _skip_strings(cursor, count, what)
    elif element == ARRAY:
        if depth >= MAX_DEPTH:
            cursor.corrupt(type_at, f"{what} nests arrays deeper than {MAX_DEPTH}")
        cursor.nested_left -= count
        if cursor.nested_left < 0:
            cursor.corrupt(count_at, f"the metadata nests more than {MAX_NESTED_ARRAYS} arrays")
        for _ in range(count):
            _locate_array(cursor, what, depth + 1)
    else:
        cursor.skip(count * least, what)
    if cursor.at - start > MAX_ARRAY_BYTES:
        cursor.corrupt(count_at, f"{what} is {cursor.at - start} bytes long, the limit is {MAX_ARRAY_BYTES}")
    return Located(ARRAY, element, count, start, cursor.at)


def _skip_strings(cursor: Cursor, count: int, what: str) -> None:
    """Steps over `count` strings: one unpack and one addition each, and one comparison for them all."""
    at, buffer, unpack = cursor.at, cursor.buffer, _U64.unpack_from
    try:
        for _ in range(count):
            at += 8 + unpack(buffer, at)[0]
    except (struct.error, OverflowError):
        at = cursor.size + 1
    if at <= cursor.size:
        cursor.at = at
        return
    for index in range(count):  # some string leaves the file: find which one
        length = cursor.string_length(f"string {index} of {what}", cursor.size)
        cursor.at += length
    raise AssertionError("unreachable: one of the strings leaves the file")


def _read_array(cursor: Cursor, array: Located, what: str) -> Any:
    if array.element_type == STRING:
        return _read_strings(cursor, array, what)
    if array.element_type == ARRAY:
        items = []
        for _ in range(array.count):
            inner = _locate_array(cursor, what, 2)
            items.append(_read_array(Cursor(cursor.buffer, cursor.size, cursor.path, inner.start), inner, what))
        return items
    dtype = SCALARS[array.element_type][1]
    values = np.frombuffer(bytes(cursor.buffer[array.start : array.end]), dtype)
    if array.element_type == BOOL:
        wrong = np.flatnonzero(values > 1)
        if wrong.size:
            cursor.corrupt(array.start + int(wrong[0]), f"{what} holds a bool with the value {values[wrong[0]]}")
        values = values.astype(np.bool_)
        values.setflags(write=False)
    return values


def _read_strings(cursor: Cursor, array: Located, what: str) -> list[str]:
    """All strings in one pass: turn each 8-byte length into one NUL, decode once, split. 128k strings take 25 ms."""
    raw = bytes(cursor.buffer[array.start : array.end])
    if not array.count:
        return []
    starts = _string_starts(raw, array.count)
    bytes_left = np.frombuffer(raw, np.uint8).copy()
    keep = np.ones(len(raw), np.bool_)
    for byte in range(7):
        keep[starts + byte] = False
    bytes_left[starts + 7] = 0
    try:
        texts = bytes_left[keep].tobytes().decode("utf-8")[1:].split("\0")
        if len(texts) == array.count:
            return texts
        pieces = _pieces(raw, starts)  # some string holds a NUL of its own
        return [piece.decode("utf-8") for piece in pieces]
    except UnicodeDecodeError:
        for index, (start, piece) in enumerate(zip(starts, _pieces(raw, starts))):
            try:
                piece.decode("utf-8")
            except UnicodeDecodeError as error:
                at = array.start + int(start) + 8 + error.start
                cursor.corrupt(at, f"string {index} of {what} is not UTF-8")
        raise


def _pieces(raw: bytes, starts: np.ndarray) -> list[bytes]:
    ends = [*starts[1:].tolist(), len(raw)]
    return [raw[start + 8 : end] for start, end in zip(starts.tolist(), ends)]


def _string_starts(raw: bytes, count: int) -> np.ndarray:
    """Where each string's length stands, int64 [count]. The walk takes every length for one byte, which is three times
    faster, and is repeated with all eight where one is longer than 255."""
    starts: list[int] = []
    add = starts.append
    at = 0
    try:
        for _ in range(count):
            add(at)
            at += 8 + raw[at]
        found = np.array(starts)
        values = np.frombuffer(raw, np.uint8)
        if at == len(raw) and not any(values[found + byte].any() for byte in range(1, 8)):
            return found
    except IndexError:
        pass
    starts.clear()
    at = 0
    for _ in range(count):
        add(at)
        at += 8 + _U64.unpack_from(raw, at)[0]
    return np.array(starts)
