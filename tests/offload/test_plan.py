"""Memory plans: arithmetic that can be checked by hand, and refusals that say what would fit."""
from __future__ import annotations

import pytest

from edge_runtime.errors import InvalidRequestError, OutOfMemoryError
from edge_runtime.models.config import ModelConfig, RopeConfig
from edge_runtime.offload import plan as planning
from edge_runtime.offload.plan import make_plan, memory

GIB, MIB = 1 << 30, 1 << 20


def config(**values) -> ModelConfig:
    sizes = dict(architecture="llama", name="test", layers=16, width=2048, heads=32, kv_heads=8, head_size=64,
                 ffn=8192, vocab_size=128_256, context_length=131_072, rms_eps=1e-5,
                 rope=RopeConfig(5e5, 64, "norm"), qkv_bias=False, qk_norm=False, tied_head=True)
    return ModelConfig(**{**sizes, **values})


def plan(memory_budget=2 * GIB, **options):
    return make_plan(config(**options.pop("config", {})), weights_bytes=700 * MIB, activation_bytes=50 * MIB,
                     memory_budget=memory_budget, **options)


def test_the_sums():
    found = plan(max_batch=4)
    page = 16 * 8 * (64 * 64 * 2 + 64 * 4 * 2)
    working = planning.RUNTIME_BYTES + 50 * MIB + 2 * 4 * 128_256 * 4
    assert found.kv == "int8" and found.kv_page_bytes == page and found.kv_bytes_per_1k_tokens == page * 1000 // 64
    assert found.working_bytes == working
    assert found.context == found.max_context == (2 * GIB - 700 * MIB - working) // page * 64
    assert found.fits and found.check() is found
    assert found.needed_bytes <= 2 * GIB < found.needed_bytes + page
    half = plan(kv="fp16")
    assert 0.5 < half.max_context / found.max_context < 0.55


def test_context_follows_model_memory_and_wish():
    assert plan(memory_budget=64 * GIB).context == 131_072
    assert plan(context=5000).context == 5000
    assert plan(config={"context_length": 100}).context == 100
    with pytest.raises(InvalidRequestError, match="131072"):
        plan(context=131_073)


def test_what_does_not_fit_is_shown_with_what_would():
    with pytest.raises(OutOfMemoryError, match="would fit") as caught:
        plan(context=131_072).check()
    assert str(plan(context=131_072).max_context)[:2] in str(caught.value)
    assert caught.value.plan.context == 131_072 and str(caught.value.plan) in str(caught.value)
    with pytest.raises(OutOfMemoryError, match="int8"):
        plan(context=131_072, kv="fp16").check()
    with pytest.raises(OutOfMemoryError, match="No context fits"):
        plan(memory_budget=500 * MIB).check()
    assert not plan(memory_budget=1).fits


def test_the_table_prints():
    text = str(plan())
    for word in ("weights", "700.0 MiB", "KV per 1k tokens", "largest context", "left", "int8"):
        assert word in text


@pytest.mark.parametrize("values", [{"kv": "fp8"}, {"context": 0}, {"context": "all"}, {"context": 2.5},
                                    {"context": True}, {"max_batch": 0}, {"memory_budget": 0},
                                    {"memory_budget": -5}, {"memory_budget": "4GB"}])
def test_refusals(values):
    with pytest.raises(InvalidRequestError, match=next(iter(values))):
        plan(**values)


def test_the_budget_leaves_a_reserve_and_caches_leave_most_memory_alone(monkeypatch):
    monkeypatch.setattr(planning, "memory", lambda: (16 * GIB, 10 * GIB))
    found = plan(memory_budget=None, context=4096)
    assert found.budget_bytes == 10 * GIB - 16 * GIB // 20
    assert found.kv_budget_bytes == 4 * GIB
    assert found.left_bytes == 10 * GIB - found.weights_bytes - found.working_bytes - 4 * GIB


def test_memory_of_a_container(tmp_path):
    machine = memory(tmp_path)
    assert 0 < machine[1] <= machine[0]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory(tmp_path)[0] == machine[0]
    (tmp_path / "memory.max").write_text(str(400 * MIB))
    (tmp_path / "memory.current").write_text(str(300 * MIB))
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {50 * MIB}\nactive_file {20 * MIB}\n")
    total, available = memory(tmp_path)
    assert total == 400 * MIB and available == min(machine[1], 170 * MIB)
