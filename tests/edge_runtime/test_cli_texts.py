"""Texts for the commands about early exit: of files, folders and JSON lines."""
from __future__ import annotations

import json

import pytest

from edge_runtime.apps.documents import DocumentError
from edge_runtime.cli_texts import read_texts
from edge_runtime.errors import InvalidRequestError


def test_texts_of_files_and_lines_in_order(tmp_path):
    texts = ["one", "two\u2028lines\x85of\x0btext", "three"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_text(f"\n{lines}\n\n", "utf-8-sig", newline="")
    (tmp_path / "b.txt").write_text("four")
    assert read_texts([tmp_path / "b.txt", tmp_path / "a.jsonl"]) == ["four", *texts]


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": 5}', "5"])
def test_a_bad_line_is_named_with_its_number(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(InvalidRequestError, match=r"a\.jsonl:2"):
        read_texts([tmp_path / "a.jsonl"])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DocumentError, match="no such file"):
        read_texts([tmp_path / "none.txt"])
