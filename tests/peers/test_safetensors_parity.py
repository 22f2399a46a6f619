"""Folders that transformers saved: the converted file's logits and tokens are transformers' own."""
from __future__ import annotations

import json

import numpy as np
import pytest

from edge_runtime.conversion import convert_folder
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel
from edge_runtime.tokenizer import Tokenizer
from tests.hf_factory import LLAMA3, QWEN2, bpe_json, byte_level
from tests.peers.test_reference_parity import CASES, hugging_face

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def saved(folder, model, pattern: str = QWEN2, **options):
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(json.dumps(bpe_json(byte_level(pattern))))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_logits(tmp_path, name):
    case = {**CASES[name], "vocab": 320}
    model = hugging_face(case)
    path = convert_folder(saved(tmp_path / "hf", model), tmp_path / "m.gguf")
    ids = np.random.default_rng(0).integers(0, 320, 150)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)[None]).logits[0].numpy()
    with GGUFFile(path) as file:
        config = config_from_gguf(file)
        ours = ReferenceModel.load(file).forward(ids)
    assert (config.architecture, config.tied_head) == (case["architecture"], case.get("tied", True))
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shards_of_half_floats(tmp_path, dtype):
    case = {**CASES["qwen2"], "vocab": 320}
    model = hugging_face(case).to(getattr(torch, dtype))
    folder = saved(tmp_path / "hf", model, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    path = convert_folder(folder, tmp_path / "m.gguf")
    ids = np.random.default_rng(0).integers(0, 320, 60)
    wide = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        theirs = wide(torch.tensor(ids)[None]).logits[0].numpy()
    with GGUFFile(path) as file:
        assert file.tensors["blk.0.attn_q.weight"].type == {"float16": "F16", "bfloat16": "BF16"}[dtype]
        np.testing.assert_allclose(ReferenceModel.load(file).forward(ids), theirs, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("pattern", [QWEN2, LLAMA3, None])
def test_tokens(tmp_path, pattern):
    model = hugging_face({**CASES["llama"], "vocab": 320})
    folder = saved(tmp_path / "hf", model, pattern)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    with GGUFFile(convert_folder(folder, tmp_path / "m.gguf")) as file:
        ours = Tokenizer.from_metadata(file.metadata)
    assert ours.eos_id == theirs.eos_token_id
    for text in ("The quick brown fox, 1234 times; it's héllo\n\n  fade", "日本語 😀<tool> the"):
        assert ours.encode(text) == theirs(text).input_ids


def test_llama_cpp_reads_the_file(tmp_path):
    pytest.importorskip("llama_cpp")
    from tests.peers.llama_cpp_model import llama_cpp_logits

    case = {**CASES["llama 3 factors"], "vocab": 320}
    model = hugging_face(case)
    path = convert_folder(saved(tmp_path / "hf", model, LLAMA3), tmp_path / "m.gguf")
    ids = np.random.default_rng(0).integers(0, 320, 100)
    with torch.no_grad():
        wanted = model(torch.tensor(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(llama_cpp_logits(path, ids), wanted, atol=1e-3 * np.abs(wanted).max())
