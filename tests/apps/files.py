"""Real files of every format, made without other people's programs."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")  # PDF 1.7, 7.6.3.3


def write_pdf(path: Path, pages: Sequence[str], encrypted: bool = False) -> Path:
    """A PDF with a line of text a page; encrypted: with RC4 and a user password."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(count))
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>",
               f"<< /Type /Pages /Kids [{kids}] /Count {count} >>".encode(),
               b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for i, text in enumerate(pages):
        shown = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
        stream = f"BT /F1 12 Tf 72 700 Td ({shown}) Tj ET".encode("latin-1") if text else b""
        objects += [f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {5 + 2 * i} 0 R /Resources << "
                    f"/Font << /F1 3 0 R >> >> >>".encode(),
                    b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream)]
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    rows = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    identity = hashlib.md5(b"identity").digest()
    lock = _lock(identity) if encrypted else b""
    name, size = identity.hex().encode(), len(objects) + 1
    return _write(path, out + b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R /ID [<%s> <%s>] "
                  b"%s>>\nstartxref\n%d\n%%%%EOF\n" % (size, rows, size, name, name, lock, start))


def _lock(identity: bytes) -> bytes:
    """The standard security handler, revision 2, with the password "secret" (PDF 1.7, 7.6.3)."""
    password = (b"secret" + PADDING)[:32]
    owner = _rc4(hashlib.md5(password).digest()[:5], password)
    key = hashlib.md5(password + owner + (-4 & 0xFFFFFFFF).to_bytes(4, "little") + identity).digest()[:5]
    return b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >> " % (
        owner.hex().encode(), _rc4(key, PADDING).hex().encode())


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j, out = list(range(256)), 0, bytearray()
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    i = j = 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def write_docx(path: Path) -> Path:
    import docx

    document = docx.Document()
    document.add_heading("The title", 0)
    document.add_paragraph("A first paragraph.")
    document.add_heading("A part", 2)
    table = document.add_table(2, 2)
    for row, values in zip(table.rows, (("name", "number"), ("Åsa", "12"))):
        for cell, value in zip(row.cells, values):
            cell.text = value
    document.add_paragraph("A last paragraph.")
    document.save(str(path))
    return path


def write_html(path: Path) -> Path:
    text = "The harbour opens on Monday. " + "It was closed for the winter, and the piers were mended meanwhile. " * 4
    return _write(path, f"""<!DOCTYPE html><html><head><title>Harbour</title><style>p {{ color: red }}</style>
<script>alert("x")</script></head><body><nav><a href="/">Home</a> <a href="/b">About</a></nav>
<article><h1>News of the harbour</h1><p>{text}</p><p>Boats pay 12 euros a night, and find water at the piers.</p>
</article></body></html>""".encode())


def _write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path
