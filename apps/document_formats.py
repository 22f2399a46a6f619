"""Text out of HTML, PDF and Word files, through libraries of the extra `documents`."""
from __future__ import annotations

import contextlib
import io
import logging
import threading
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

from edge_runtime.apps.documents import MAX_BYTES, DocumentError, decoded
from edge_runtime.errors import MissingExtraError

MAX_XML = 64 << 20  # bytes of a Word file's XML; its tree takes ten times as much, and a thousand pages have 10 MB
_PDFIUM = threading.Lock()  # pdfium must not be called from two threads at once


def text_of(path: Path, raw: bytes) -> str:
    """Raises DocumentError for a file that is corrupt, encrypted or without text, MissingExtraError."""
    suffix = path.suffix.lower()
    read = {".pdf": _pdf, ".docx": _docx}.get(suffix, _html)
    return read(path, raw)


def _module(name: str, package: str, path: Path) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(package, "documents", f"Reading {path}") from error


def _html(path: Path, raw: bytes) -> str:
    """The main text as Markdown; all text where no main one is found."""
    trafilatura = _module("trafilatura", "trafilatura", path)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):  # a mark of UTF-16, which trafilatura does not look at
        raw = decoded(path, raw).encode()
    if b"\0" in raw[:8192]:
        raise DocumentError(path, "is binary, not HTML")
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # what it cannot parse is reported by us
    try:
        text = trafilatura.extract(raw, output_format="markdown", include_comments=False, favor_recall=True)
        text = text or trafilatura.html2txt(raw)
    except Exception as error:
        raise DocumentError(path, f"is not readable HTML: {error}") from error
    if not (text or "").strip():
        raise DocumentError(path, "holds no text that a reader would see")
    return str(text)


def _pdf(path: Path, raw: bytes) -> str:
    pdfium = _module("pypdfium2", "pypdfium2", path)
    with _PDFIUM:
        try:
            document = pdfium.PdfDocument(raw)
        except pdfium.PdfiumError as error:
            if "password" in str(error).lower() or "security" in str(error).lower():
                raise DocumentError(path, "is encrypted: remove its password first") from error
            raise DocumentError(path, "is not a readable PDF file: it is damaged, or something else") from error
        try:
            pages = [_pdf_page(document, number) for number in range(len(document))]
        except pdfium.PdfiumError as error:
            raise DocumentError(path, f"is a damaged PDF file: {error}") from error
        finally:
            document.close()
    text = "\n\n".join(page for page in pages if page.strip())
    if not text:
        count = f"{len(pages)} page{'s' * (len(pages) != 1)}"
        raise DocumentError(path, f"holds no text: its {count} are empty, or images that need OCR first")
    return text


def _pdf_page(document: Any, number: int) -> str:
    with contextlib.closing(document[number]) as page, contextlib.closing(page.get_textpage()) as text:
        found = str(text.get_text_range())
    # U+FFFE is pdfium's mark of a word divided at the end of a line.
    lines = found.replace("\r\n", "\n").replace("\r", "\n").replace("\ufffe\n", "").replace("\ufffe", "")
    return lines.replace("\0", "")


def _docx(path: Path, raw: bytes) -> str:
    """Paragraphs and tables in their order; headings as Markdown's."""
    docx = _module("docx", "python-docx", path)
    if raw.startswith(b"\xd0\xcf\x11\xe0"):
        raise DocumentError(path, "is encrypted, or in Word's old .doc format: save it as .docx without a password")
    _check_size(path, raw)
    try:
        blocks = [_docx_block(block) for block in docx.Document(io.BytesIO(raw)).iter_inner_content()]
    except Exception as error:  # python-docx lets what zipfile and lxml raise through
        raise DocumentError(path, f"is not a readable Word file: {type(error).__name__}") from error
    return "\n\n".join(block for block in blocks if block.strip())


def _check_size(path: Path, raw: bytes) -> None:
    """A small archive may unpack to more than the memory holds."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            sizes = [(entry.filename, entry.file_size) for entry in archive.infolist()]
    except Exception as error:  # what else than BadZipFile comes of damaged archives is not documented
        raise DocumentError(path, f"is not a readable Word file: {type(error).__name__}") from error
    whole, markup = sum(size for _, size in sizes), sum(size for name, size in sizes if "/media/" not in name)
    if whole > MAX_BYTES or markup > MAX_XML:
        raise DocumentError(path, f"unpacks to {whole >> 20} MiB, {markup >> 20} of them without pictures: more than "
                                  f"the {MAX_BYTES >> 20} and {MAX_XML >> 20} that are read. Split it.")


def _docx_block(block: Any) -> str:
    if hasattr(block, "rows"):
        return "\n".join(" | ".join(" ".join(cell.text.split()) for cell in row.cells) for row in block.rows)
    style = (block.style.name or "") if block.style is not None else ""
    level = style.removeprefix("Heading ")
    if style == "Title" or (style.startswith("Heading ") and level.isdigit()):
        return "#" * (1 if style == "Title" else min(6, int(level))) + " " + " ".join(block.text.split())
    return str(block.text)
