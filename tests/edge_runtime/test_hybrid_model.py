"""LLM(offload="on"): weights on an ONNX device, KV on the host, a pool on the device that holds a few sequences."""
from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime import LLM, SamplingParams, hybrid_model
from edge_runtime.cli_explain import explained
from edge_runtime.devices.onnx.providers import PROVIDERS
from edge_runtime.errors import InvalidRequestError, OutOfMemoryError
from edge_runtime.hybrid_model import threads_of
from edge_runtime.models import bundled
from edge_runtime.offload import profile_store
from edge_runtime.offload.choices import Mode
from tests.edge_runtime.llms import lose_device, settled

GAP = 1e-2  # of the two best logits, below which device and host may prefer different tokens
CONTEXT, BATCH = 512, 8
MODEL_BYTES = 6116352 + (16 << 20)  # weights and a step's activations on the device, as the plan tells
POOL_BYTES = 2 * CONTEXT * 10240  # two full sequences of the eight
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
NAMES = ("Adler", "Bach", "Cramer", "Duden", "Ernst", "Fink", "Gauss", "Huber")


@pytest.fixture(scope="module", autouse=True)
def quick_profile(tmp_path_factory):
    """A second of measuring, and nothing of it left behind."""
    patch = pytest.MonkeyPatch()
    patch.setattr(hybrid_model, "PROFILE_SECONDS", 1.0)
    folder = tmp_path_factory.mktemp("profiles")
    patch.setattr(profile_store, "folder", lambda: folder)
    yield folder
    patch.undo()


def opened(**options) -> LLM:
    return LLM(device="onnx:cpu", context=CONTEXT, **{
        "offload": "on", "kv": "fp16", "device_memory": MODEL_BYTES + POOL_BYTES, "max_batch": BATCH, "threads": 2,
        **options})


@pytest.fixture(scope="module")
def device_only():
    with LLM(device="onnx:cpu", context=CONTEXT, max_batch=BATCH, threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def hybrid():
    with opened() as llm:
        yield llm
        settled(llm)


@pytest.fixture(scope="module")
def prompts(device_only) -> list[list[int]]:
    texts = (f"The board of {name} met on {i + 1} May. It sold {3 * i + 2} boats and bought {i + 4} houses. "
             for i, name in enumerate(NAMES))
    return [device_only.chat_prompt(bundled.summarize_prompt(text * (1 + i % 4))) for i, text in enumerate(texts)]


def gap_at(llm: LLM, ids: list[int], first: int, second: int) -> float:
    """How much better the device-only model finds one token than another after `ids`."""
    scores = llm.score([[*ids, first], [*ids, second]])
    return float(scores[0][-1] - scores[1][-1])


def check_same(reference: LLM, prompt: list[int], want, got, gap: float = GAP) -> None:
    """Greedy tokens are the same up to a choice that hangs by less than `gap`."""
    want, got = list(want), list(got)
    if want == got:
        return
    at = next(i for i, pair in enumerate(zip(want, got)) if pair[0] != pair[1])
    assert abs(gap_at(reference, prompt + want[:at], want[at], got[at])) < gap, (at, want, got)


def test_replies_are_those_of_the_device_alone(device_only, hybrid, prompts):
    want = [list(reply.token_ids) for reply in device_only.generate(prompts, GREEDY)]
    together = [list(reply.token_ids) for reply in hybrid.generate(prompts, GREEDY)]
    assert all(len(tokens) == 24 for tokens in together)
    for prompt, one, other in zip(prompts, want, together):
        check_same(device_only, prompt, one, other)
    assert sum(one == other for one, other in zip(want, together)) >= len(prompts) // 2
    single = list(hybrid.generate(prompts[3], GREEDY, priority="interactive").token_ids)
    check_same(device_only, prompts[3], want[3], single)
    assert sum(hybrid.status().placement.modes.values()) >= 2 * 23


@pytest.mark.parametrize("mode", list(Mode))
def test_every_mode_gives_the_same_replies(mode, device_only, hybrid, prompts, monkeypatch):
    monkeypatch.setattr(hybrid._loaded.device.apex, "force", mode)
    before = hybrid.status().placement.modes.get(mode.value, 0)
    replies = hybrid.generate(prompts, GREEDY)
    for prompt, want, got in zip(prompts, device_only.generate(prompts, GREEDY), replies):
        check_same(device_only, prompt, want.token_ids, got.token_ids)
    laps = hybrid.status().placement.laps
    assert hybrid.status().placement.modes[mode.value] > before
    if mode is Mode.DEVICE_ONLY:
        assert max(lap.on_device for lap in laps) > 1
    else:  # the pool holds two full sequences of these eight
        assert any(lap.mode is mode and lap.on_host for lap in laps)


def test_8_bits_on_the_host(device_only, prompts):
    with opened(kv="int8") as llm:
        assert llm.plan.kv == "int8"
        for prompt, want, got in zip(prompts, device_only.generate(prompts, GREEDY), llm.generate(prompts, GREEDY)):
            check_same(device_only, prompt, want.token_ids, got.token_ids, gap=0.3)


def test_the_plan_and_the_status_tell_what_lives_where(hybrid):
    plan, there = hybrid.plan, hybrid.plan.on_device
    assert plan.hybrid and plan.kv == "fp16" and hybrid.context == CONTEXT and there.shared
    assert (there.kv_pool_bytes, there.kv_pool_tokens, there.sequences) == (POOL_BYTES, 2 * CONTEXT, 2)
    asked = LLM.plan_for(device="onnx:cpu", context=CONTEXT, kv="fp16", max_batch=BATCH, offload="on",
                         device_memory=MODEL_BYTES + POOL_BYTES)
    assert asked.on_device == there and asked.kv_page_bytes == plan.kv_page_bytes
    hybrid.generate("Hello", GREEDY)
    status = hybrid.status()
    assert status.kv_home == "host" and status.mode == status.placement.mode.value
    assert status.placement.pool_tokens == there.kv_pool_tokens and status.device_kv_budget == POOL_BYTES
    assert 0 <= status.device_kv_bytes <= POOL_BYTES and status.placement.lost == 0
    assert status.host_kv_bytes == status.pages_used * status.page_bytes
    assert status.host_kv_budget == plan.kv_budget_bytes // plan.kv_page_bytes * plan.kv_page_bytes


def test_explained(device_only, hybrid):
    hybrid.generate("Hello", GREEDY)
    lines = explained(hybrid).splitlines()
    assert lines[0].startswith("hybrid: weights in the memory of onnx:cpu") and lines[0].endswith('(offload="on")')
    assert lines[1].split()[:2] == ["mode", "laps"] and lines[1].endswith("bound by")
    modes = hybrid.status().placement.modes
    rows = {line.split()[0]: line.split() for line in lines[2:2 + len(modes)]}
    assert {mode: int(rows[mode][1]) for mode in modes} == modes
    last = hybrid.status().placement.laps[-1]
    assert "considered for the last lap" in lines[-1] and all(mode in lines[-1] for mode in last.considered)
    assert "nothing to schedule" in explained(device_only)


def test_prefixes_and_sessions_are_found_again(device_only, hybrid, prompts):
    first = hybrid.generate(prompts[7], GREEDY)
    again = hybrid.generate(prompts[7], GREEDY)
    assert again.stats.cached_tokens >= len(prompts[7]) // 64 * 64 > 0
    check_same(device_only, prompts[7], first.token_ids, again.token_ids)
    texts = []
    for llm in (device_only, hybrid):
        with llm.session() as session:
            replies = [session.chat(text, GREEDY) for text in ("The river was long.", "And the town?", "Who went?")]
            assert replies[2].stats.cached_tokens > replies[1].stats.cached_tokens > 0
            texts.append([list(reply.token_ids) for reply in replies])
    assert texts[0][0][:4] == texts[1][0][:4]


def test_requests_come_go_and_are_cancelled_at_once(device_only, hybrid, prompts):
    want = {i: list(reply.token_ids) for i, reply in enumerate(device_only.generate(prompts, GREEDY))}
    found, errors = {}, []

    def ask(i: int) -> None:
        try:
            if i % 4 == 3:
                with hybrid.stream(prompts[i % 8], max_tokens=300, ignore_eos=True, priority="batch") as stream:
                    next(iter(stream))  # and it is left
            else:
                reply = hybrid.generate(prompts[i % 8], GREEDY, priority=("interactive", "batch")[i % 2])
                found[i] = list(reply.token_ids)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join(120)
    assert not errors and len(found) == 18
    for i, tokens in found.items():
        check_same(device_only, prompts[i % 8], want[i % 8], tokens)
    settled(hybrid)


def test_vectors_and_scores(device_only, hybrid):
    ours, theirs = (np.array(llm.embed("The river was long.")) for llm in (hybrid, device_only))
    assert np.abs(ours - theirs).max() < 0.02
    ours, theirs = (llm.score(["The river was long."])[0][1:] for llm in (hybrid, device_only))
    assert np.abs(ours - theirs).max() < 0.05


def test_a_lost_device_is_replaced_and_the_reply_goes_on(device_only, prompts, caplog):
    want = list(device_only.generate(prompts[2], GREEDY).token_ids)
    with opened() as llm:
        accelerator, before = llm._loaded.device.accelerator, llm._loaded.device.apex
        handover = told_apart(before.cost.curves.handover)
        lose_device(llm, segments=100)  # in the middle of the reply
        got = list(llm.generate(prompts[2], GREEDY).token_ids)
        status = llm.status().placement
        assert status.lost == 1 and llm._loaded.device.accelerator is not accelerator
        check_same(device_only, prompts[2], want, got)
        after = llm._loaded.device.apex
        assert after is not before and after.cost.curves.handover == handover
        assert set(after.pairs).isdisjoint(before.pairs) and after.tbt_seconds == before.tbt_seconds
        assert "1 device lost on the way" in explained(llm) and "goes on with the same sequences" in caplog.text


def told_apart(handover: float) -> float:
    """The stored profile of the CPU, which takes over, is another one from now on than the one in use; its handover."""
    for file in profile_store.folder().iterdir():
        profile = profile_store.read(file)
        if profile.curves.handover == handover:
            assert profile.setting.device == "onnx:cpu"
            profile_store.save(replace(profile, curves=replace(profile.curves, handover=2 * handover + 1e-6)))
            return 2 * handover + 1e-6
    raise AssertionError("no such profile")


def test_the_profile_is_measured_once(quick_profile, monkeypatch):
    before = {file.name for file in quick_profile.iterdir()}
    said: list[str] = []
    with opened(kv="int8", threads=3, progress=said.append) as llm:
        llm.generate("Hello", max_tokens=2)
    new = {file.name for file in quick_profile.iterdir()} - before
    assert len(new) == 1 and any(text.startswith("profile: ") for text in said)

    def never(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr("edge_runtime.profiling.measure", never)
    said.clear()
    with opened(kv="int8", threads=3, progress=said.append) as llm:
        llm.generate("Hello", max_tokens=2)
    assert not any(text.startswith("profile: ") for text in said)


def test_auto_offloads_where_the_sequences_do_not_fit(quick_profile):
    small = {"device": "onnx:cpu", "context": CONTEXT, "device_memory": MODEL_BYTES + POOL_BYTES}
    assert LLM.plan_for(**small, max_batch=BATCH).hybrid and not LLM.plan_for(**small, max_batch=2).hybrid
    assert LLM.plan_for(**small, max_batch=BATCH, kv="int8").kv == "int8"
    assert not LLM.plan_for(device="onnx:cpu", context=CONTEXT, max_batch=BATCH).hybrid
    with LLM(**small, max_batch=2, threads=1) as llm:
        assert llm.status().placement is None and llm.status().kv_home == "device"
        llm.generate("Hello", max_tokens=2)
        assert 0 < llm.status().device_kv_bytes <= llm.status().device_kv_budget and llm.status().host_kv_bytes == 0
    with opened(offload="auto", tbt_ms=500.0) as llm:
        assert llm._loaded.device.apex.tbt_seconds == 0.5
        assert llm.generate("Hello", GREEDY).token_ids


@pytest.mark.parametrize("options, error", [
    ({"offload": "perhaps"}, "offload"), ({"tbt_ms": 0}, "tbt_ms"), ({"tbt_ms": -1.0}, "tbt_ms"),
    ({"device_memory": 0}, "device_memory"), ({"device_memory": -5}, "device_memory"),
    ({"device_memory": 1 << 50}, "device_memory"), ({"host_threads": 0}, "host_threads"),
    ({"threads": 5000}, "threads"), ({"threads": 5000, "offload": "off", "kv": "auto"}, "threads"),
    ({"host_cores": (-1,)}, "host_cores"), ({"device_cores": ("a",)}, "device_cores"), ({"kv": "fp32"}, "kv"),
    ({"kv": "fp8"}, "kv"), ({"device": "cpu"}, "offload"), ({"device": "llama.cpp"}, "offload"),
    ({"device": "cpu", "offload": "auto", "tbt_ms": 5}, "tbt_ms"), ({"offload": "off", "tbt_ms": 5}, "tbt_ms"),
    ({"offload": "off"}, "kv"), ({"exit_layers": (1,)}, "exit_layers"), ({"early_exit": "verify"}, "early_exit")])
def test_values_that_are_refused(options, error):
    given = {"device": "onnx:cpu", "offload": "on", "kv": "fp16", "context": CONTEXT, "threads": 1,
             "device_memory": MODEL_BYTES + POOL_BYTES, **options}
    with pytest.raises(InvalidRequestError, match=error):
        LLM(**given).close()


def test_a_device_with_too_little_memory_is_refused_with_what_would_do():
    with pytest.raises(OutOfMemoryError, match="device_memory of") as caught:
        opened(device_memory=MODEL_BYTES)
    needed = caught.value.plan.on_device.needed_bytes
    with opened(device_memory=needed) as llm:
        assert llm.generate("Hello", GREEDY).token_ids


def test_threads_of_device_and_host():
    assert threads_of(PROVIDERS["cpu"], 8, None) == (4, 4) and threads_of(PROVIDERS["cpu"], 1, None) == (1, 1)
    assert threads_of(PROVIDERS["cpu"], 8, 2) == (6, 2) and threads_of(PROVIDERS["webgpu"], 8, None) == (8, 8)
    assert threads_of(PROVIDERS["webgpu"], 8, 6) == (8, 6)
