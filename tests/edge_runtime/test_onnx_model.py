"""LLM(device="onnx:..."): a file on ONNX Runtime, through the whole runtime; and what is said where it cannot."""
from __future__ import annotations

import threading

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime import LLM, SamplingParams
from edge_runtime.devices.onnx import providers
from edge_runtime.errors import InvalidRequestError, MissingExtraError, OutOfMemoryError
from edge_runtime.loading import DEVICES, check_device, is_onnx
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel
from tests.gguf_factory import write_model

GAP = 1e-3  # of the reference's two best logits, below which another token may be the best


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("onnx") / "m.gguf", architecture="qwen3", types="Q4_0", width=64)


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, device="onnx:cpu", threads=1, context=512, max_batch=4) as llm:
        yield llm


def check_greedy(path, prompt: list[int], tokens: list[int], gap: float = GAP) -> None:
    with GGUFFile(path) as file:
        logits = ReferenceModel.load(file).forward(prompt + tokens)
    for i, token in enumerate(tokens):
        row = logits[len(prompt) + i - 1]
        assert row[token] > row.max() - gap


def test_greedy_batches_are_those_of_the_reference(llm, path):
    rng = np.random.default_rng(1)
    prompts = [list(map(int, rng.integers(0, 260, n))) for n in (3, 70, 200, 9, 33, 1)]
    replies = llm.generate(prompts, SamplingParams(max_tokens=20, temperature=0))
    for prompt, reply in zip(prompts, replies):
        assert reply.token_ids
        check_greedy(path, prompt, list(reply.token_ids))
    again = llm.generate(prompts[2], SamplingParams(max_tokens=20, temperature=0))
    assert list(again.token_ids) == list(replies[2].token_ids)


def test_plan_embeddings_sessions_and_cancellation(llm, path):
    assert llm.plan.device == "onnx:cpu" and llm.plan.kv == "fp32" and llm.context == 512
    with LLM(path, device="cpu", threads=1) as cpu:
        ours, theirs = (np.array(model.embed("Hello there")) for model in (llm, cpu))
    assert np.abs(ours - theirs).max() < 0.02
    with llm.session() as session:
        assert session.chat("Hello", SamplingParams(max_tokens=4)).text is not None
        assert session.chat("Again", SamplingParams(max_tokens=4)).text is not None
    stream = llm.stream("Hello", SamplingParams(max_tokens=400))
    next(iter(stream))
    stream.close()
    results = []
    threads = [threading.Thread(target=lambda: results.append(llm.generate("Hi", SamplingParams(max_tokens=5))))
               for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6


def test_names_of_devices():
    assert tuple(name.removeprefix("onnx:") for name in DEVICES[3:]) == tuple(providers.PROVIDERS)
    assert [is_onnx(name) for name in ("onnx:cpu", "webgpu", "onnx:cuda", "cpu", "auto", "llama.cpp")] == [
        True, True, True, False, False, False]
    assert check_device("onnx:webgpu") == "onnx:webgpu" and check_device("auto") == "cpu"
    for bad in ("onnx:", "onnx:tpu", "onnx:llama.cpp", "gpu"):
        with pytest.raises(InvalidRequestError):
            check_device(bad)


def test_values_that_an_onnx_device_refuses(path):
    for options in (dict(kv="int8"), dict(context=0), dict(context=1 << 20), dict(max_batch=0), dict(memory_budget=-1),
                    dict(exit_layers=(1,))):
        with pytest.raises(InvalidRequestError):
            LLM(path, device="onnx:cpu", **options)
    with pytest.raises(OutOfMemoryError, match="weights"):
        LLM(path, device="onnx:cpu", memory_budget=1 << 20)


def test_a_missing_provider_names_its_install(path, monkeypatch):
    monkeypatch.setattr(providers, "_REGISTERED", set())
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    for name, extra in (("webgpu", "webgpu"), ("cuda", "cuda"), ("openvino", "openvino"), ("onnx:qnn", "qnn")):
        with pytest.raises(MissingExtraError, match=rf"pip install 'edge-runtime\[{extra}\]'"):
            LLM(path, device=name)
    found = providers.survey()
    assert [one.provider.name for one in found] == list(providers.PROVIDERS)
    assert all("pip install" in one.problem for one in found)  # onnxruntime itself is missing in this test
    assert providers.best() is None


def test_auto_keeps_the_cpu_where_no_accelerator_is(path, monkeypatch):
    monkeypatch.setattr(providers, "best", lambda: None)
    assert LLM.plan_for(path).device == "cpu"
    monkeypatch.setattr(providers, "best", lambda: "onnx:cpu")
    assert LLM.plan_for(path).device == "onnx:cpu" and LLM.plan_for(path, kv="int8").device == "cpu"
    with LLM(path, kv="fp16") as llm:
        assert llm.plan.device == "cpu"
    with LLM(path) as llm:
        assert llm.plan.device == "onnx:cpu"
    monkeypatch.setattr(providers, "best", lambda: "onnx:cuda")  # found, but it does not start
    with LLM(path) as llm:
        assert llm.plan.device == "cpu"
