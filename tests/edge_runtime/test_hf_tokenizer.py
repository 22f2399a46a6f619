"""tokenizer.json as GGUF metadata: the same tokens, families told apart, unknown ones refused."""
from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as HFTokenizer

from edge_runtime import LLM
from edge_runtime.conversion import as_gguf, convert_folder
from edge_runtime.errors import CorruptModelError, InvalidRequestError, ModelNotFoundError, UnsupportedModelError
from edge_runtime.hf_tokenizer import CHECK_TEXT, tokenizer_metadata, words
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.pretokenizers import PRE_TOKENIZERS, splitter
from edge_runtime.tokenizer import Tokenizer
from tests.hf_factory import LLAMA3, QWEN2, bpe_json, byte_level, hf_config, spm_json, write_hf_folder

TEXTS = (CHECK_TEXT, "", " the thing", "<tool>the</tool> 123<|end|>", "he's in  the bed\n\n\nfade", "日本 😀")


def whole(pattern: str) -> dict:
    found = bpe_json(byte_level(pattern))
    found["model"]["ignore_merges"] = True
    return found


CASES = {
    "llama-bpe": whole(LLAMA3), "dbrx": bpe_json(byte_level(LLAMA3)), "qwen2": bpe_json(byte_level(QWEN2)),
    "gpt-2": bpe_json(byte_level(None), merges_as_pairs=False),
    "smollm": bpe_json({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                              byte_level(None)]}),
}


@pytest.mark.parametrize("pre", CASES)
def test_byte_level_tokenizers(tmp_path, pre):
    folder = write_hf_folder(tmp_path, tokenizer=CASES[pre])
    found = tokenizer_metadata(folder, 320, None, (304, 303))
    assert found["tokenizer.ggml.pre"] == pre and len(found["tokenizer.ggml.tokens"]) == 320
    assert found["tokenizer.ggml.eos_token_id"] == 304 and found["tokenizer.ggml.eot_token_id"] == 303
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    ours, theirs = Tokenizer.from_metadata(found), HFTokenizer.from_file(str(folder / "tokenizer.json"))
    assert not ours.add_bos and ours.eog_ids >= {304}
    for text in TEXTS:
        assert ours.encode(text, parse_special=True) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text


def test_every_family_that_cuts_differently_is_recognised(tmp_path):
    """Names that stand for the same rules may stand for each other, others not."""
    for name, spec in PRE_TOKENIZERS.items():
        if name == "default":
            continue
        splits = json.loads(splits_of(spec))
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        tokenizer = bpe_json({"type": "Sequence", "pretokenizers": [*splits, last]})
        tokenizer["model"]["ignore_merges"] = spec.ignore_merges
        found = tokenizer_metadata(write_hf_folder(tmp_path, tokenizer=tokenizer), 320)["tokenizer.ggml.pre"]
        assert words(found) == words(name) and PRE_TOKENIZERS[found].ignore_merges == spec.ignore_merges, (name, found)


def splits_of(spec) -> str:
    """The splits of a family as JSON."""
    from tokenizers import models

    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter(spec)
    return json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"]["pretokenizers"])


def test_sentence_piece(tmp_path):
    folder = write_hf_folder(tmp_path, tokenizer=spm_json(), tokenizer_config={"add_eos_token": False})
    found = tokenizer_metadata(folder, 400)
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"]
    ours, theirs = Tokenizer.from_metadata(found), HFTokenizer.from_file(str(folder / "tokenizer.json"))
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.add_bos, ours.add_eos) == (1, 2, 0, True, False)
    for text in (CHECK_TEXT, "the thing", "he ate the\n\nbér 😀"):
        assert ours.encode(text) == theirs.encode(text).ids


def test_what_is_not_known_is_refused_by_name(tmp_path):
    odd = bpe_json(byte_level(r"\p{L}+|[^\p{L}]+"))
    spaces = bpe_json({"type": "WhitespaceSplit"})
    lower = bpe_json(byte_level(QWEN2), normalizer={"type": "Lowercase"})
    level = {**odd, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    for tokenizer, text in ((odd, r"pre-tokenizer.*p\{L\}.*qwen2"), (spaces, "WhitespaceSplit"), (lower, "Lowercase"),
                            (level, "WordLevel")):
        with pytest.raises(UnsupportedModelError, match=text):
            tokenizer_metadata(write_hf_folder(tmp_path, tokenizer=tokenizer), 320)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        tokenizer_metadata(tmp_path, 320)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.model"):
        tokenizer_metadata(tmp_path, 320)


def test_broken_tokenizers(tmp_path):
    folder = write_hf_folder(tmp_path)
    with pytest.raises(CorruptModelError, match="outside the model's vocabulary of 300"):
        tokenizer_metadata(folder, 300)
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(CorruptModelError, match="no tokenizer"):
        tokenizer_metadata(folder, 320)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptModelError, match="not JSON"):
        tokenizer_metadata(folder, 320)


def test_chat_templates(tmp_path):
    folder = write_hf_folder(tmp_path, tokenizer_config={"chat_template": [{"name": "tool", "template": "x"},
                                                                           {"name": "default", "template": "y"}]})
    assert tokenizer_metadata(folder, 320)["tokenizer.chat_template"] == "y"
    (folder / "chat_template.jinja").write_text("z")
    assert tokenizer_metadata(folder, 320)["tokenizer.chat_template"] == "z"


def test_a_converted_folder_runs(tmp_path):
    folder = write_hf_folder(tmp_path / "hf", config=hf_config(hidden_size=64, head_dim=16), dtype="BF16")
    with LLM(convert_folder(folder, tmp_path / "m.gguf"), threads=1) as llm:
        reply = llm.generate("the thing", max_tokens=4, temperature=0.0)
        assert reply.stats.completion_tokens >= 1
    with pytest.raises(UnsupportedModelError, match=r"edge-runtime quantize .*hf .*\.gguf"):
        LLM(folder)
    with as_gguf(folder, tmp_path / "out.gguf") as path, GGUFFile(path) as file:
        assert file.metadata["general.name"] == "hf"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m.gguf"]
    with as_gguf(tmp_path / "m.gguf", tmp_path / "out.gguf") as path:
        assert path == tmp_path / "m.gguf"
    with pytest.raises(InvalidRequestError, match="a file, not a folder"):
        convert_folder(folder, tmp_path)
