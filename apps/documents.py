"""Files as documents: found in folders and by patterns, read as text whatever their format."""
from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import EdgeRuntimeError

TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".text")
RICH_SUFFIXES = (".html", ".htm", ".pdf", ".docx")  # read by `document_formats`, with the extra `documents`
SUFFIXES = (*TEXT_SUFFIXES, *RICH_SUFFIXES)
MAX_BYTES = 256 << 20  # a text lies in memory some times over while it is cut; what is larger is data, not a document


class DocumentError(EdgeRuntimeError):
    """A file that cannot be read as text: says which and why."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class Document:
    """path as it was named; text, decoded and not empty."""

    path: Path
    text: str


def find_files(paths: Iterable[Path], suffixes: Sequence[str] = SUFFIXES,
               skip: Iterable[Path] = ()) -> Iterator[Path | DocumentError]:
    """Files in the order named; a folder's in sorted order, its subfolders' included, those with a suffix in
    `suffixes` and none that is hidden. A path with * ? or [ that does not exist is a pattern (** is any folders). A
    file named itself, or by a pattern, may have any suffix. No file comes twice, none that is `skip` or in it. Found
    as they are asked for; a folder that cannot be opened is an error in its place."""
    seen: set[Path] = set()
    skipped = {real_path(path) for path in skip}
    for path in paths:
        for found in _named(path, suffixes):
            if isinstance(found, DocumentError):
                yield found
                continue
            real = real_path(found)
            if real not in seen and not skipped.intersection((real, *real.parents)):
                seen.add(real)
                yield found


def real_path(path: Path) -> Path:
    """Without links; unlike Path.resolve's it is some path for one that leads to itself too."""
    return Path(os.path.realpath(path))


def _named(path: Path, suffixes: Sequence[str]) -> Iterator[Path | DocumentError]:
    try:
        if path.is_dir():
            yield from _folder(path, suffixes)
        elif path.exists():
            yield path
        elif glob.has_magic(str(path)):
            matches = sorted(Path(match) for match in glob.iglob(str(path), recursive=True))
            for match in matches:
                if match.is_dir():
                    yield from _folder(match, suffixes, quiet=True)
                elif match.is_file() or not match.exists():  # no pipe: reading it would wait for its writer
                    yield match
            if not matches:
                yield DocumentError(path, "no file matches this pattern")
        else:
            yield DocumentError(path, "no such file or folder")
    except OSError as error:
        yield DocumentError(path, f"cannot be opened: {error.strerror or error}")


def _folder(path: Path, suffixes: Sequence[str], quiet: bool = False) -> Iterator[Path | DocumentError]:
    found = False
    for file in _walk(path, suffixes):
        found = True
        yield file
    if not found and not quiet:
        yield DocumentError(path, f"no file with {', '.join(suffixes)} in this folder")


def _walk(folder: Path, suffixes: Sequence[str]) -> Iterator[Path | DocumentError]:
    try:
        with os.scandir(folder) as entries:
            listed = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except OSError as error:
        yield DocumentError(folder, f"cannot be opened: {error.strerror or error}")
        return
    for name, is_folder in listed:
        if name.startswith("."):
            continue
        path = folder / name
        if is_folder:
            yield from _walk(path, suffixes)
        elif path.suffix.lower() in suffixes:
            try:
                usable = path.is_file()
            except OSError as error:  # a link into a folder that cannot be opened
                yield DocumentError(path, f"cannot be opened: {error.strerror or error}")
                continue
            if usable:
                yield path


def read_document(path: Path) -> Document:
    """The text of a file: HTML, PDF and Word by their suffix, all others as UTF-8, or UTF-16 and UTF-32 with a byte
    order mark. Raises DocumentError for a file that cannot be read, is encrypted, is binary, is encoded otherwise or
    holds no text; MissingExtraError where the reader of its format is not installed."""
    try:
        with path.open("rb") as file:  # a device has no size, and a file may grow while it is read
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise DocumentError(path, f"has more than the {MAX_BYTES >> 20} MiB that are read as one document. Split "
                                      f"it.")
    except OSError as error:
        raise DocumentError(path, f"cannot be read: {error.strerror or error}") from error
    return Document(path, text_of(path, raw))


def text_of(path: Path, raw: bytes) -> str:
    """The text of a file with that name and these bytes. Raises as `read_document`."""
    if path.suffix.lower() in RICH_SUFFIXES and raw.strip():
        from edge_runtime.apps import document_formats

        text = document_formats.text_of(path, raw)
    else:
        text = decoded(path, raw)
    if not text.strip():
        raise DocumentError(path, "holds no text")
    return text


def decoded(path: Path, raw: bytes) -> str:
    """Plain text. Raises DocumentError for bytes of another encoding, or of none."""
    # UTF-32's mark begins with UTF-16's, so it is asked for first.
    marks = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"),
             (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
    encoding = next((name for mark, name in marks if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\0" in raw[:8192]:
            raise DocumentError(path, "is binary, not text") from error
        raise DocumentError(path, f"is not {encoding.removesuffix('-sig').upper()}: byte {raw[error.start]:#04x} at "
                                  f"offset {error.start}. Convert it to UTF-8.") from error
    if "\0" in text:
        raise DocumentError(path, f"is binary, not text: a zero byte at character {text.index(chr(0))}")
    return text.replace("\r\n", "\n").replace("\r", "\n")
