"""Finding and reading documents: text, HTML, PDF and Word files made here."""
from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edge_runtime.apps import document_formats, documents
from edge_runtime.apps.documents import DocumentError, find_files, read_document
from edge_runtime.errors import MissingExtraError
from tests.apps.files import write_docx, write_html, write_pdf


def names(found: list, root: Path) -> list[str]:
    return [f.relative_to(root).as_posix() for f in found if isinstance(f, Path)]


def test_folders_are_searched_in_order_and_no_file_comes_twice(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.TXT", "image.png", ".hidden.txt", ".git/d.txt", "sub/e.markdown", "sub.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    odd = tmp_path / "image.png"
    found = list(find_files([tmp_path / "sub", odd, tmp_path, tmp_path / "none"]))
    assert names(found, tmp_path) == ["sub/c.TXT", "sub/e.markdown", "image.png", "a.md", "b.txt", "sub.pdf"]
    errors = [f for f in found if isinstance(f, DocumentError)]
    assert [e.path for e in errors] == [tmp_path / "none"]


def test_patterns_are_filled_in(tmp_path):
    for name in ("a/1.txt", "a/b/2.txt", "a/b/3.log", "[odd].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(list(find_files([tmp_path / "**" / "*.txt"])), tmp_path) == ["[odd].txt", "a/1.txt", "a/b/2.txt"]
    assert names(list(find_files([tmp_path / "a" / "b" / "*.log"])), tmp_path) == ["a/b/3.log"]
    assert names(list(find_files([tmp_path / "[odd].txt"])), tmp_path) == ["[odd].txt"]
    [error] = find_files([tmp_path / "*.doc"])
    assert isinstance(error, DocumentError) and "matches" in error.reason


def test_patterns_meet_links_to_nowhere_and_pipes(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    found = list(find_files([tmp_path / "*.txt", tmp_path / "self.txt"]))
    assert found[:3] == [tmp_path / name for name in ("a.txt", "gone.txt", "self.txt")]
    assert [type(one) for one in found[3:]] == [DocumentError] and found[3].path.name == "self.txt"
    for path in found[1:3]:
        with pytest.raises(DocumentError, match="cannot be read"):
            read_document(path)
    assert list(find_files([tmp_path / "a.txt"], skip=[tmp_path / "self.txt"])) == [tmp_path / "a.txt"]


def test_the_output_is_no_input(tmp_path):
    for name in ("in.txt", "out/in.txt.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(list(find_files([tmp_path], skip=[tmp_path / "out"])), tmp_path) == ["in.txt"]


def test_a_folder_without_texts_is_an_error_not_silence(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    [found] = find_files([tmp_path])
    assert isinstance(found, DocumentError) and ".txt" in found.reason


def test_a_folder_without_permission_does_not_hide_the_others(tmp_path, monkeypatch):
    for name in ("a/1.txt", "closed/2.txt", "z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    real = os.scandir

    def scandir(path):  # root may read everything: the system's refusal is played
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(documents.os, "scandir", scandir)
    found = list(find_files([tmp_path]))
    assert names(found, tmp_path) == ["a/1.txt", "z.txt"]
    [error] = [f for f in found if isinstance(f, DocumentError)]
    assert error.path == tmp_path / "closed" and "Permission denied" in error.reason


def test_a_link_that_cannot_be_followed_does_not_hide_the_others(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("text")
    real = Path.is_file

    def locked(path):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "is_file", locked)
    found = [str(one) if isinstance(one, DocumentError) else one.name for one in find_files([tmp_path])]
    assert found == ["a.txt", f"{tmp_path / 'b.txt'}: cannot be opened: Permission denied", "c.txt"]


def test_a_device_without_an_end_is_named(monkeypatch):
    monkeypatch.setattr(documents, "MAX_BYTES", 1 << 20)
    with pytest.raises(DocumentError, match="more than the 1 MiB"):
        read_document(Path("/dev/zero"))


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="needs a user to become")
def test_a_folder_without_permission_for_another_user(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "closed" / "a.txt").write_text("a")
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    code = ("import os, sys; from pathlib import Path; from edge_runtime.apps.documents import find_files; "
            "os.setuid(65534); print(*find_files([Path(sys.argv[1])]))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and "closed" in done.stdout and "Permission denied" in done.stdout, done.stderr


@pytest.mark.parametrize("raw, text", [
    ("Grüße\n".encode(), "Grüße\n"),
    ("﻿x".encode(), "x"),
    ("Grüße".encode("utf-16"), "Grüße"),
    ("Grüße".encode("utf-32"), "Grüße"),
    (b"a\r\nb\rc", "a\nb\nc"),
])
def test_text_is_decoded(tmp_path, raw, text):
    (tmp_path / "f").write_bytes(raw)
    assert read_document(tmp_path / "f").text == text


@pytest.mark.parametrize("name, raw, word", [
    ("f", b"Gr\xfc\xdfe", "byte 0xfc at offset 2"),
    ("f.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary"),
    ("f", b"abc\0def", "binary"),
    ("f", b"", "no text"),
    ("f", b" \n\t\n", "no text"),
    ("f.pdf", b"", "no text"),
    ("f.pdf", b"%PDF-1.4 and then nothing", "not a readable PDF"),
    ("f.pdf", b"just some text", "not a readable PDF"),
    ("f.docx", b"PK\3\4 and then nothing", "not a readable Word file"),
    ("f.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 rest", "encrypted"),
    ("f.html", b"\0\1\2\3binary", "binary"),
    ("f.html", b"<html><body></body></html>", "no text"),
])
def test_what_is_no_text_is_named(tmp_path, name, raw, word):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DocumentError, match=word) as caught:
        read_document(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(DocumentError, match="cannot be read"):
        read_document(tmp_path / "gone.txt")


def test_a_file_larger_than_the_limit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_BYTES", 1 << 20)
    (tmp_path / "f.txt").write_bytes(b"a" * (1 << 20) + b"b")
    with pytest.raises(DocumentError, match="Split"):
        read_document(tmp_path / "f.txt")


def test_pdf_pages_come_in_order(tmp_path):
    path = write_pdf(tmp_path / "a.pdf", ["The first page (of two).", "The second page."])
    assert read_document(path).text.split("\n\n") == ["The first page (of two).", "The second page."]


def test_encrypted_and_empty_pdfs_are_named(tmp_path):
    with pytest.raises(DocumentError, match="encrypted"):
        read_document(write_pdf(tmp_path / "locked.pdf", ["secret"], encrypted=True))
    with pytest.raises(DocumentError, match="2 pages are empty, or images"):
        read_document(write_pdf(tmp_path / "empty.pdf", ["", ""]))


def test_word_headings_paragraphs_and_tables(tmp_path):
    path = write_docx(tmp_path / "a.docx")
    assert read_document(path).text == ("# The title\n\nA first paragraph.\n\n## A part\n\nname | number\nÅsa | 12\n\n"
                                        "A last paragraph.")


def test_a_word_file_that_is_some_other_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.writestr("x.txt", "x")
    with pytest.raises(DocumentError, match="not a readable Word file"):
        read_document(tmp_path / "a.docx")


def test_a_word_file_that_unpacks_to_more_than_the_memory_is_named(tmp_path, monkeypatch):
    path = write_docx(tmp_path / "a.docx")
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in parts.items():
            archive.writestr(name, raw.replace(b"A first", b"<w:br/>" * 300_000 + b"A first"))
    assert (tmp_path / "bomb.docx").stat().st_size < 100_000
    monkeypatch.setattr(document_formats, "MAX_XML", 1 << 20)
    assert read_document(path).text
    with pytest.raises(DocumentError, match="without pictures"):
        read_document(tmp_path / "bomb.docx")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
def test_html_of_other_encodings(tmp_path, encoding):
    page = '<html><head><meta charset="latin-1"></head><body><p>The café opens on Monday at nine.</p></body></html>'
    (tmp_path / "a.html").write_bytes(page.encode(encoding))
    assert "The caf\u00e9 opens" in read_document(tmp_path / "a.html").text


def test_html_gives_what_a_reader_sees(tmp_path):
    text = read_document(write_html(tmp_path / "a.html")).text
    assert "The harbour opens on Monday." in text and "Boats pay 12 euros" in text
    for hidden in ("alert(", "color: red", "Home", "<p>"):
        assert hidden not in text


@pytest.mark.parametrize("name, package", [("a.pdf", "pypdfium2"), ("a.docx", "docx"), ("a.html", "trafilatura")])
def test_a_missing_reader_names_the_command_that_mends_it(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"something")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edge-runtime\[documents\]'"):
        read_document(tmp_path / name)
