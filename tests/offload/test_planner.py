"""What lies where on a device and its host: sums to be checked by hand, choices, refusals that say the mend."""
from __future__ import annotations

import dataclasses
import re

import pytest

from edge_runtime.devices.accelerator import DeviceCapacity
from edge_runtime.devices.onnx.kv import capacity_class
from edge_runtime.errors import InvalidRequestError, OutOfMemoryError
from edge_runtime.offload import planner
from edge_runtime.offload.plan import GIB, KV_SHARE, MIB, RUNTIME_BYTES
from edge_runtime.offload.planner import DeviceNeeds, OffloadOptions, plan_device
from tests.offload.test_plan import config

TOKEN = 16 * 2 * 512 * 4  # float32 keys and values of 16 layers, 8 heads of 64: 64 KiB
FP16_PAGE, INT8_PAGE = 16 * 8 * 64 * 64 * 2 * 2, 16 * 8 * (64 * 64 * 2 + 64 * 4 * 2)
NEEDS = DeviceNeeds(weights=700 * MIB, working=50 * MIB, token=TOKEN, sequence=lambda tokens: tokens * TOKEN,
                    lap=100 * MIB)
HOST = RUNTIME_BYTES + 2 * 32 * 128_256 * 4  # and logits of 32 sequences
OWN = DeviceCapacity(shared=False, total=8 * GIB, free=7 * GIB)
HOSTS = DeviceCapacity(shared=True)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(planner, "memory", lambda: (32 * GIB, 24 * GIB))


def plan(capacity=OWN, *, device_memory=None, offload="auto", tbt_ms=None, **options):
    return plan_device(config(), NEEDS, capacity, device="onnx:webgpu",
                       options=OffloadOptions(offload, device_memory, tbt_ms), **options)


def test_all_on_the_device_where_all_sequences_fit():
    found = plan(context=1024, max_batch=8, device_memory=2 * GIB)
    there = found.on_device
    assert not found.hybrid and there.fits and found.fits and found.kv == "fp32"
    assert there.kv_pool_bytes == 8 * 1024 * TOKEN * 3 // 2  # 512 MiB, and half as much for growth
    assert there.sequences == 8 and there.split_tokens == 0 and there.kv_least_bytes == 1024 * TOKEN
    assert there.left_bytes == 2 * GIB - 750 * MIB - 768 * MIB
    working = RUNTIME_BYTES + 2 * 8 * 128_256 * 4
    assert found.needed_bytes == working  # of the host's memory: no weights, no KV
    assert found.placement.startswith("device-only")


def test_hybrid_where_they_do_not():
    found = plan(context=8192, max_batch=32, device_memory=2 * GIB)  # 512 MiB of KV a sequence, 1298 are left
    there = found.on_device
    assert found.hybrid and there.kv_pool_bytes == 2 * GIB - 750 * MIB
    assert there.kv_pool_tokens == 1298 * 16 and there.sequences == 2 and there.split_tokens == 0
    assert "32 sequences of 8,192 tokens would take 16384.0 MiB" in there.reason and "1298.0 MiB" in there.reason
    assert found.base_bytes == HOST + 100 * MIB and found.needed_bytes == found.base_bytes + found.context_bytes
    assert "2 of up to 32 full sequences" in found.placement
    assert found.left_bytes == 24 * GIB - found.base_bytes - found.kv_budget_bytes


def test_half_precision_on_the_host_where_everybody_fits_and_8_bits_where_not():
    # 8 GiB of the host's 32 for KV: fp16 holds 2^18 tokens of 32 KiB, 32 sequences of 8192.
    assert 32 * GIB // KV_SHARE == 32 * 8192 // 64 * FP16_PAGE
    found = plan(context=8192, device_memory=2 * GIB)
    assert (found.kv, found.kv_page_bytes, found.kv_budget_bytes) == ("fp16", FP16_PAGE, 8 * GIB)
    found = plan(context=8193, device_memory=2 * GIB)
    assert (found.kv, found.kv_page_bytes) == ("int8", INT8_PAGE)
    assert plan(context=8192, kv="int8", device_memory=2 * GIB).kv == "int8"
    assert plan(context=131_072, kv="fp16", device_memory=2 * GIB).kv == "fp16"


def test_one_long_sequence_is_split():
    found = plan(context=131_072, max_batch=1, device_memory=2 * GIB)  # 8 GiB of KV
    there = found.on_device
    assert found.hybrid and there.sequences == 0 and there.split_tokens == 1298 * 16 // 64 * 64
    assert f"up to {there.split_tokens:,} tokens of a sequence" in found.placement and found.fits
    # In classes of capacity, the largest one that the pool holds.
    classes = DeviceNeeds(700 * MIB, 50 * MIB, TOKEN, lambda tokens: -(-tokens // 4096) * 4096 * TOKEN)
    found = plan_device(config(), classes, OWN, device="webgpu", context=131_072, max_batch=1,
                        options=OffloadOptions("on", 2 * GIB))
    assert found.on_device.split_tokens == 5 * 4096


def test_one_memory_is_counted_once():
    whole = plan(HOSTS, context=1024, max_batch=4)
    assert not whole.hybrid and whole.on_device.shared  # nothing is gained where there is one memory
    working = RUNTIME_BYTES + 2 * 4 * 128_256 * 4
    assert whole.needed_bytes == working + 750 * MIB + 1024 * TOKEN
    found = plan(HOSTS, context=8192, device_memory=2 * GIB)
    there = found.on_device
    assert found.hybrid and there.shared and there.kv_pool_bytes == 1298 * MIB
    assert found.base_bytes == HOST + 100 * MIB + 2 * GIB
    assert found.needed_bytes == found.base_bytes + 128 * FP16_PAGE
    budget = found.base_bytes + 128 * INT8_PAGE  # of everything: the pool makes room for one context of the host's
    tight = plan(HOSTS, context=8192, device_memory=2 * GIB, memory_budget=budget - 10 * MIB)
    assert tight.fits and tight.on_device.kv_pool_bytes == 1288 * MIB and tight.needed_bytes == budget - 10 * MIB
    free = plan(HOSTS, context=8192, offload="on")  # nobody said how much: half of what is left
    assert free.on_device.kv_pool_bytes == min(
        32 * 8192 * TOKEN, (free.budget_bytes - HOST - 100 * MIB - 750 * MIB) // 2)


def test_what_the_device_tells_of_its_memory():
    assert plan(context=1024).on_device.memory_bytes == 7 * GIB - 8 * GIB // 20
    small = DeviceCapacity(False, total=2 * GIB)
    assert plan(small, context=1024).on_device.memory_bytes == 2 * GIB - 256 * MIB
    assert "2.00 GiB that it has" in str(plan(small, context=1024))
    silent = DeviceCapacity(shared=False)
    assert plan(silent, context=1024).on_device.shared  # as integrated devices: the host's
    own = plan(silent, context=1024, device_memory=GIB)
    assert not own.on_device.shared and "which it does not tell" in str(own)
    with pytest.raises(InvalidRequestError, match=f"device_memory={9 * GIB}: must be at most {8 * GIB}"):
        plan(device_memory=9 * GIB)
    with pytest.raises(InvalidRequestError, match="shares the host's memory"):
        plan(HOSTS, device_memory=33 * GIB)


def test_who_decides():
    fits = dict(context=1024, max_batch=4)
    assert plan(offload="on", **fits).hybrid and plan(tbt_ms=50, **fits).hybrid
    assert "tbt_ms=50" in plan(tbt_ms=50, **fits).on_device.reason
    assert plan(HOSTS, tbt_ms=50, **fits).hybrid
    large = dict(context=8192, max_batch=32, device_memory=2 * GIB)
    assert not plan(offload="off", **large).hybrid and not plan(kv="fp32", **large).hybrid
    assert plan(offload="off", **large).on_device.sequences == 2  # the others wait for their turn
    assert plan(device_memory=2 * GIB, max_batch=1).context == 4096  # "auto", on the device
    wide = plan(device_memory=2 * GIB, offload="on")  # "auto", as the host's memory allows
    assert wide.context == 131_072 == wide.max_context and wide.kv == "int8"


def test_a_device_that_is_too_small_says_what_would_do():
    with pytest.raises(OutOfMemoryError, match=r"766\.0 MiB of the memory of onnx:webgpu") as caught:
        plan(context=4096, offload="on", device_memory=700 * MIB).check()
    there = caught.value.plan.on_device
    assert there.needed_bytes == 750 * MIB + 256 * TOKEN and "device_memory of 766.0 MiB" in str(caught.value)
    assert plan(context=4096, offload="on", device_memory=there.needed_bytes).check().fits
    with pytest.raises(OutOfMemoryError, match='offload="on"'):
        plan(context=8192, offload="off", device_memory=GIB).check()
    with pytest.raises(OutOfMemoryError, match="context"):
        plan(context=131_072, offload="on", memory_budget=GIB).check()


def test_a_large_pool_in_one_memory_leaves_room_for_a_context():
    found = [plan(HOSTS, offload="on", kv="int8", memory_budget=2 * GIB, device_memory=size * MIB)
             for size in range(800, 3000, 100)]
    pools = [one.on_device.kv_pool_bytes for one in found]
    assert pools == sorted(pools) and pools[0] == 50 * MIB
    both = 2 * GIB - HOST - 100 * MIB - 750 * MIB
    for one in found:
        assert one.check().context * INT8_PAGE // 64 + INT8_PAGE > min(both // 2, one.model_context * INT8_PAGE // 64)
        assert one.needed_bytes <= 2 * GIB
    given = plan(HOSTS, offload="on", kv="int8", memory_budget=2 * GIB, device_memory=2 * GIB, context=1024).on_device
    assert given.kv_pool_bytes == both - 16 * INT8_PAGE  # who names a context wants no more of it


@pytest.mark.parametrize("capacity", [OWN, HOSTS])
@pytest.mark.parametrize("offload", ["on", "off"])
@pytest.mark.parametrize("context", ["auto", 1, 100, 8192])
@pytest.mark.parametrize("budget", [1, GIB])
def test_the_budget_that_an_error_names_is_enough(capacity, offload, context, budget, monkeypatch):
    needs = dataclasses.replace(NEEDS, weights=1200 * MIB,
                                sequence=lambda tokens: capacity_class(tokens, 131_072) * TOKEN)
    monkeypatch.setitem(globals(), "NEEDS", needs)
    asked = {"capacity": capacity, "offload": offload, "context": context}
    try:
        plan(**asked, memory_budget=budget).check()
    except OutOfMemoryError as error:
        number, unit = re.search(r"raise memory_budget to ([\d.]+) (MiB|GiB)", str(error)).groups()
        assert plan(**asked, memory_budget=int(float(number) * {"MiB": MIB, "GiB": GIB}[unit])).check().fits
    else:
        assert budget == GIB


@pytest.mark.parametrize("values", [
    {"kv": "fp8"}, {"kv": "int8"}, {"kv": "fp16", "offload": "off"}, {"kv": "fp32", "offload": "on"}, {"context": 0},
    {"context": 131_073}, {"context": True}, {"max_batch": 0}, {"memory_budget": 0}, {"memory_budget": -1},
    {"device_memory": 0}, {"device_memory": -1}, {"device_memory": 1.5}, {"device_memory": True}, {"offload": "maybe"},
    {"offload": None}, {"tbt_ms": 0}, {"tbt_ms": -1.0}, {"tbt_ms": float("nan")}, {"tbt_ms": float("inf")},
    {"tbt_ms": True}, {"tbt_ms": 10**400}, {"tbt_ms": 5.0, "offload": "off"}])
def test_refusals(values):
    with pytest.raises(InvalidRequestError, match=next(iter(values))):
        plan(**{"context": 1024, "max_batch": 4, **values})


@pytest.mark.parametrize("values", [{"host_threads": 0}, {"host_threads": 2.0}, {"host_cores": (-1,)},
                                    {"host_threads": 1025}, {"host_cores": (0, 10**30)}, {"device_cores": (1 << 20,)},
                                    {"device_cores": ("0",)}, {"host_cores": [0]}])
def test_options_that_no_machine_has(values):
    with pytest.raises(InvalidRequestError, match=next(iter(values))):
        OffloadOptions(**values).check()


def test_the_table_prints_device_and_host():
    text = str(plan(context=8192, device_memory=2 * GIB))
    for words in ("hybrid: weights in the memory of onnx:webgpu", "KV pool 1.27 GiB, 20,768 tokens: 2 whole sequences",
                  "2.00 GiB of 8.00 GiB that it has", "32 sequences of 8,192 tokens"):
        assert words in text
    split = str(plan(context=131_072, max_batch=1, device_memory=2 * GIB))
    assert "the first 20,736 tokens of one" in split
