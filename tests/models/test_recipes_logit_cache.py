"""Rows of text, and the teacher's logits on disk: what is stored, kills, other teachers, damage, full disks."""
from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from edge_runtime.errors import CorruptModelError, InvalidRequestError, NumericalError
from edge_runtime.models.recipes.logit_cache import LogitCache, Manifest, _largest, top_logits
from edge_runtime.models.recipes.text_rows import TextRows, find_texts, read_texts, text_rows

V, CONTEXT = 50, 16
TEMPERATURES = (1.0, 2.0)


def rows(count: int = 100) -> TextRows:
    return TextRows(np.random.default_rng(0).integers(0, V, count).astype(np.int32), CONTEXT)


def manifest(text: TextRows, **changes) -> Manifest:
    values = {"teacher": "t", "tokenizer": "v", "text": text.digest, "tokens": len(text.tokens), "vocab_size": V,
              "context": CONTEXT, "top_k": 8, "temperatures": TEMPERATURES}
    return Manifest(**{**values, **changes})


def logits_of(ids: np.ndarray) -> np.ndarray:
    """Depends on every token before, as a model's do."""
    seen = [ids[: i + 1] for i in range(len(ids))]
    return np.stack([3 * np.random.default_rng(before).standard_normal(V) for before in seen]).astype(np.float32)


def teacher(ids: np.ndarray):
    found = logits_of(ids)
    yield found[:5]
    yield found[5:]


def test_every_token_is_a_target_once():
    for count in (17, 18, 32, 33, 34, 100):
        text = rows(count)
        seen = np.zeros(count, int)
        for row in range(len(text)):
            np.testing.assert_array_equal(text.targets(row)[:-1], text.inputs(row)[1:])
            at = text.start(row) + 1 + np.flatnonzero(text.weights(row))
            np.testing.assert_array_equal(text.tokens[at], text.targets(row)[text.weights(row) > 0])
            seen[at] += 1
        assert seen[0] == 0 and (seen[1:] == 1).all()
    train, held_out = rows(100).split(0.2)
    assert [*train, *held_out] == list(range(7)) and len(held_out) == 1
    assert rows(17).split(0.5) == (range(1), range(1, 1))


def test_texts_of_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("aa", encoding="utf-8")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "bb"}\n\n"cc"\n', encoding="utf-8")
    (tmp_path / "in" / "other.bin").write_bytes(b"\xff")
    files = find_texts([tmp_path / "a.txt", tmp_path / "in"])
    assert [text for file in files for text in read_texts(file)] == ["aa", "bb", "cc"]
    found = text_rows(["aa", " ", "bb"], lambda t: [ord(c) for c in t], 0, 3)
    assert found.tokens.tolist() == [97, 97, 0, 98, 98, 0] and len(found) == 2


def test_bad_text_is_named(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ok \xff")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.jsonl").write_text('{"txt": 1}', encoding="utf-8")
    for call, words in ((lambda: find_texts([]), "at least one"), (lambda: find_texts([tmp_path / "x"]), "exists"),
                        (lambda: find_texts([tmp_path / "empty"]), "holds"), (lambda: read_texts(bad), "byte 3"),
                        (lambda: read_texts(tmp_path / "no.jsonl"), "line 1"),
                        (lambda: text_rows(["abc"], lambda t: [1, 2, 3], None, 3), "3 tokens")):
        with pytest.raises(InvalidRequestError, match=words):
            call()


def test_top_logits():
    logits = logits_of(np.arange(6))
    ids, values, rest = top_logits(logits, 8, TEMPERATURES)
    order = np.argsort(-logits, axis=1)
    np.testing.assert_array_equal(ids, order[:, :8])
    np.testing.assert_allclose(values, np.take_along_axis(logits, ids, 1) - logits.max(1, keepdims=True))
    others = np.take_along_axis(logits, order[:, 8:], 1) - logits.max(1, keepdims=True)
    for i, temperature in enumerate(TEMPERATURES):
        np.testing.assert_allclose(rest[i], np.log(np.exp(others / temperature).sum(1)), rtol=1e-5)
    ids, _, rest = top_logits(logits, V, (1.0,))
    assert sorted(ids[0]) == list(range(V)) and (rest == -np.inf).all()
    for bad in (np.nan, np.inf):
        with pytest.raises(NumericalError, match="finite"):
            top_logits(np.where(np.arange(V) == 7, bad, logits).astype(np.float32), 4, (1.0,))
    ids, values, rest = top_logits(np.where(np.arange(V) < 3, logits, -np.inf).astype(np.float32), 4, (1.0,))
    assert (values[:, 3] == -np.inf).all() and (rest == -np.inf).all() and set(ids[0, :3]) == {0, 1, 2}


@pytest.mark.parametrize("k, size", [(1, 40), (4, 64), (4, 1001), (16, 4096), (64, 64)])
def test_the_largest_of_many(k, size):
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for logits in (rng.standard_normal((9, size)), rng.integers(0, 5, (9, size)), np.sort(rng.random((9, size)))):
        logits = logits.astype(np.float32)
        want = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal([_largest(row, k) for row in logits], want)


def test_what_is_stored(tmp_path):
    text = rows()
    cache = LogitCache(tmp_path, manifest(text), text)
    seen: list[tuple[int, int]] = []
    assert cache.fill(teacher, lambda *at: seen.append(at)) == 7 == len(text)
    assert cache.complete and seen == [(i, 7) for i in range(1, 8)]
    assert cache.path.stat().st_size == cache.manifest.file_bytes == 7 * (CONTEXT * (8 * 4 + 8) + 4)
    for row in range(7):
        ids, values, rest = top_logits(logits_of(text.inputs(row)), 8, TEMPERATURES)
        for i, temperature in enumerate(TEMPERATURES):
            found = cache.row(row, temperature)
            np.testing.assert_array_equal(found.ids, ids)
            np.testing.assert_allclose(found.values, values, atol=4e-3)
            np.testing.assert_allclose(found.rest, rest[i], rtol=1e-6)
    with pytest.raises(InvalidRequestError, match="temperature"):
        cache.row(0, 3.0)
    assert cache.fill(teacher) == 0


def test_wide_vocabularies_take_four_bytes():
    assert manifest(rows(), vocab_size=65536, top_k=64).bytes_per_token == 264
    assert manifest(rows(), vocab_size=65537, top_k=64).bytes_per_token == 392


def test_a_killed_run_goes_on(tmp_path):
    text = rows()
    whole = LogitCache(tmp_path / "whole", manifest(text), text)
    whole.fill(teacher)
    cache = LogitCache(tmp_path / "cut", manifest(text), text)
    cache.fill(teacher)
    raw = cache.path.read_bytes()
    cache.path.write_bytes(raw[: 3 * cache.manifest.record_bytes + 11])
    again = LogitCache(tmp_path / "cut", manifest(text), text)
    assert again.rows_done == 3 and not again.complete
    assert again.fill(teacher) == 4
    assert again.path.read_bytes() == whole.path.read_bytes()


def test_caches_of_something_else_are_refused(tmp_path):
    text = rows()
    LogitCache(tmp_path, manifest(text), text).fill(teacher)
    for change in ({"teacher": "another"}, {"top_k": 9}, {"text": "x"}, {"tokenizer": "w"}, {"temperatures": (1.0,)}):
        with pytest.raises(InvalidRequestError, match=f"this run's {next(iter(change))} "):
            LogitCache(tmp_path, replace(manifest(text), **change), text)
    with pytest.raises(InvalidRequestError, match="top_k"):
        LogitCache(tmp_path / "new", manifest(text, top_k=V + 1), text)


def test_damage_is_noticed(tmp_path):
    text = rows()
    cache = LogitCache(tmp_path, manifest(text), text)
    cache.fill(teacher)
    raw = bytearray(cache.path.read_bytes())
    raw[2 * cache.manifest.record_bytes + 40] ^= 1
    cache.path.write_bytes(raw)
    fresh = LogitCache(tmp_path, manifest(text), text)
    fresh.row(1, 1.0)
    with pytest.raises(CorruptModelError, match="row 2"):
        fresh.row(2, 1.0)
    (tmp_path / "manifest.json").write_text(json.dumps({"teacher": 1}))
    with pytest.raises(CorruptModelError, match="manifest"):
        LogitCache(tmp_path, manifest(text), text)
    (tmp_path / "manifest.json").write_text(json.dumps(asdict(manifest(text)) | {"context": "16"}))
    with pytest.raises(CorruptModelError, match="context is '16'"):
        LogitCache(tmp_path, manifest(text), text)


def test_a_full_disk_keeps_what_is_whole(tmp_path, monkeypatch):
    text = rows()
    cache = LogitCache(tmp_path, manifest(text), text)
    append = LogitCache._append

    def full(self, file, record):
        if self.rows_done >= 2:
            file.write(record[:100])
            raise OSError(28, "No space left on device")
        append(self, file, record)

    monkeypatch.setattr(LogitCache, "_append", full)
    with pytest.raises(OSError, match="No space"):
        cache.fill(teacher)
    monkeypatch.setattr(LogitCache, "_append", append)
    assert cache.rows_done == 2 and cache.fill(teacher) == 5
    assert cache.row(6, 2.0).ids.shape == (CONTEXT, 8)


def test_a_teacher_that_says_too_little(tmp_path):
    text = rows()
    with pytest.raises(ValueError, match="16 tokens"):
        LogitCache(tmp_path, manifest(text), text).fill(lambda ids: [logits_of(ids)[:3]])
