"""Simulated time: laps played out against the formulas, whole runs against what can be worked out by hand, the
command."""
from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from edge_runtime.cli import app
from edge_runtime.errors import InvalidRequestError
from edge_runtime.offload.apex import Apex
from edge_runtime.offload.choices import Mode
from edge_runtime.offload.cost_model import CostModel
from edge_runtime.offload.hardware import describe, device_pool, host_pool
from edge_runtime.offload.hardware_presets import MACHINES, MODELS, machine, model
from edge_runtime.offload.lap_replay import Cohort, LapReplay, Processors
from edge_runtime.offload.lap_times import LapTimes, Load
from edge_runtime.offload.paper_settings import T4, run
from edge_runtime.offload.simulation_result import Percentiles
from edge_runtime.offload.simulator import POLICIES, Limits, Simulation, predict_decode, simulate
from edge_runtime.offload.traces import Request, synthetic
from tests.offload.test_apex import LAYERS, curves

TOKENS = 4000


def load(rows: int) -> Load:
    return Load(rows, rows * TOKENS)


def drawn(seed: int) -> tuple[CostModel, Load, Load]:
    """A machine, and loads of device and host."""
    draw = random.Random(seed)
    cost = CostModel(curves(
        linear=10 ** draw.uniform(-4, -2), device=10 ** draw.uniform(-9, -6.5), host=10 ** draw.uniform(-8, -6),
        row=1e-5, link=1e-10, contention_device=draw.uniform(1, 1.3), contention_host=draw.uniform(1, 1.3)))
    return cost, load(draw.randrange(1, 32)), load(draw.randrange(2, 64))


@pytest.mark.parametrize("seed", range(24))
def test_laps_take_what_the_formulas_say(seed):
    cost, device, host = drawn(seed)
    times, rows = LapTimes(cost), device.rows + host.rows
    first, second = load(host.rows // 2), load(host.rows - host.rows // 2)
    for name, arguments, lap, tolerance in (
            ("lockstep", (device, host, rows), times.synchronous(device, host, rows), 1e-9),
            ("lockstep", (device, Load(0, 0), device.rows), times.device_only(device), 1e-9),
            ("pipelined", (device, first, second), times.pipelined(device, first, second), 0.07),
            ("streaming", (device, host), times.streaming(device, host), 0.07)):
        by = Processors(cost)
        getattr(LapReplay(by, times), name)(*arguments)
        assert by.now == pytest.approx(lap.seconds, rel=tolerance), name
        assert by.device_busy <= by.now * (1 + 1e-9) and by.host_busy <= by.now * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_overlap_yields_what_the_formula_says(seed):
    """Cohorts that start a lap apart, over many laps."""
    cost, device, host = drawn(seed)
    times, by, cohorts = LapTimes(cost), Processors(cost), min(LAYERS, host.rows)
    replay, size, ground, flying = LapReplay(by, times), -(-host.rows // cohorts), list(range(host.rows)), []
    laps, landed, began = 150, 0, 0.0
    for lap in range(laps):
        if lap == laps // 3:
            landed, began = 0, by.now
        if ground:
            keys, ground = ground[:size], ground[size:]
            flying.append(Cohort(tuple(keys), load(len(keys))))
        replay.overlap(device, flying)
        done = [one for one in flying if one.layer == LAYERS and one.task is None]
        flying = [one for one in flying if one not in done]
        ground += [key for one in done for key in one.keys]
        landed += sum(len(one.keys) for one in done)
    rate = (device.rows * (laps - laps // 3) + landed) / (by.now - began)
    predicted = times.overlap(device, host, cohorts)
    assert predicted.tokens / predicted.seconds == pytest.approx(rate, rel=0.15)


def test_draining_brings_all_cohorts_down():
    cost = CostModel(curves())
    by = Processors(cost)
    replay, cohorts = LapReplay(by, LapTimes(cost)), [Cohort((i,), load(1)) for i in range(3)]
    replay.overlap(load(2), cohorts[:1])
    replay.overlap(load(2), cohorts[:2])
    replay.overlap(load(2), cohorts, drain=True)
    assert all(one.layer == LAYERS and one.task is None for one in cohorts) and not by.tasks


# Whole runs

def limits(**more) -> Limits:
    return Limits(**{"pool_tokens": 40_000, "host_tokens": 10**6, **more})


def test_one_request_by_hand():
    """A prompt in three chunks, then one token a lap."""
    cost = CostModel(curves(linear=2e-3, row=1e-5))
    result = simulate(cost.curves, [Request(3.0, 250, 11)], limits(chunk=100), "gpu-only")
    chunks = ((100, 0), (100, 100), (50, 200))
    prompt = sum(LAYERS * (cost.linear(n) + cost.device_prompt(n, before)) for n, before in chunks)
    decode = sum(LAYERS * (cost.linear(1) + cost.device_attention([250 + i])) for i in range(1, 11))
    assert result.ttft.p50 == pytest.approx(prompt, rel=1e-6)
    assert result.seconds == pytest.approx(prompt + decode, rel=1e-6)
    assert (result.requests, result.tokens, result.refused) == (1, 11, 0)
    assert result.tbt.p50 == pytest.approx(decode / 10, rel=0.01)
    assert result.device_utilization == pytest.approx(1.0) and result.host_utilization == 0
    assert result.modes == {"device-only": pytest.approx(1.0)}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_every_request(policy):
    seed = random.randrange(10**6)
    print("seed", seed)
    requests = synthetic(24, 600, 40, rate=4.0, spread=0.6, seed=seed)
    result = simulate(curves(linear=1e-3, device=1e-8, host=1e-7, link=1e-10, layers=8), requests,
                      limits(pool_tokens=4096), policy)
    assert result.requests == 24 and result.tokens == sum(one.output for one in requests)
    assert 0 < result.device_utilization <= 1 + 1e-9 and 0 <= result.host_utilization <= 1 + 1e-9
    assert sum(result.modes.values()) == pytest.approx(1)
    assert all(lap.kv_on_device <= 4096 for lap in result.laps)
    starts = [lap.start for lap in result.laps]
    assert starts == sorted(starts)
    if policy in ("synchronous", "pipelined", "overlap", "streaming"):
        assert result.modes.get(policy, 0) > 0.3


def test_hybrid_wins_where_the_pool_is_small_and_not_where_all_fits():
    setting = curves(linear=2e-3, device=1e-8, host=1e-8)
    requests = synthetic(40, 1000, 60)
    small = {policy: simulate(setting, requests, limits(pool_tokens=5000), policy) for policy in ("gpu-only", "apex")}
    assert small["apex"].throughput > 1.5 * small["gpu-only"].throughput
    assert small["gpu-only"].batch < 5 < small["apex"].batch
    large = {policy: simulate(setting, requests, limits(pool_tokens=10**5), policy) for policy in ("gpu-only", "apex")}
    assert large["apex"].throughput >= 0.98 * large["gpu-only"].throughput


@pytest.mark.parametrize("seed", range(4))
def test_the_scheduler_is_about_as_good_as_the_best_mode(seed):
    draw = random.Random(seed)
    for _ in range(3):
        setting = curves(linear=10 ** draw.uniform(-3.5, -2), device=10 ** draw.uniform(-8.5, -6.5),
                         host=10 ** draw.uniform(-8, -6.5), row=1e-5, link=1e-9)
        lengths = [draw.randrange(1000, 6000) for _ in range(draw.choice((4, 12, 32)))]
        pool = max(sum(lengths) // draw.choice((2, 4, 8)), max(lengths) + 1024)
        rates = {mode: predict_decode(setting, lengths, pool, mode=mode, laps=48).tokens_per_second for mode in Mode}
        patient = Apex(CostModel(setting), expected_tokens=10**5)  # nobody ends here: whatever helps is worth a copy
        chosen = predict_decode(setting, lengths, pool, laps=48, apex=patient)
        assert chosen.tokens_per_second > 0.85 * max(rates.values()), (seed, chosen, rates)


def test_a_machine_that_takes_no_time_comes_to_an_end():
    nothing = curves(linear=0.0, device=0.0, host=0.0, link=0.0)
    for policy in POLICIES:
        assert simulate(nothing, synthetic(3, 100, 20), Limits(1000, 10_000), policy).requests == 3


def test_what_cannot_run_is_refused_or_told():
    result = simulate(curves(), [Request(0, 9000, 10), Request(0, 100, 10)], limits(pool_tokens=2048), "gpu-only")
    assert (result.requests, result.refused) == (1, 1)
    with pytest.raises(InvalidRequestError, match="policy='fastest'"):
        Simulation(curves(), [], limits(), "fastest")
    for name in ("pool_tokens", "host_tokens", "batch", "chunk", "bring"):
        with pytest.raises(InvalidRequestError, match=f"{name}=-1"):
            limits(**{name: -1})
    for arguments in ({"lengths": []}, {"laps": 0}):
        with pytest.raises(InvalidRequestError, match=next(iter(arguments))):
            predict_decode(curves(), **{"lengths": [100], "pool_tokens": 500, **arguments})


def test_interactive_requests_are_served_in_time():
    setting = curves(linear=1e-4, device=1e-8, host=1e-7, row=1e-5)
    requests = [Request(0.0, 500, 300) for _ in range(40)] + [Request(2.5, 50, 60, interactive=True)]
    slow = simulate(setting, requests, limits(chunk=64), "apex")
    fast = simulate(setting, requests, limits(chunk=64, tbt_seconds=0.006), "apex")
    assert fast.requests == slow.requests == 41
    seen = [lap for lap in fast.laps if not lap.prompt and lap.waiting]
    assert seen and all(lap.seconds <= 0.006 * 1.01 for lap in seen)


def test_decode_by_hand():
    setting = curves(linear=2e-3, device=1e-7, host=1e-7, link=0.0)
    found = predict_decode(setting, [1000] * 4, 5000, mode=Mode.DEVICE_ONLY, laps=10)
    assert found.mode is Mode.DEVICE_ONLY and found.tokens == 40
    assert found.tokens_per_second == pytest.approx(4 / (LAYERS * (2e-3 + 4100e-7)), rel=0.02)
    host = predict_decode(setting, [1000] * 4, 0, mode=Mode.SYNCHRONOUS, laps=10)
    assert host.tokens_per_second == pytest.approx(4 / (LAYERS * (2e-3 + 4100e-7)), rel=0.02)


def test_percentiles_are_values_that_were_seen():
    assert Percentiles.of([3.0, 1.0, 2.0]) == Percentiles(2.0, 3.0, 3.0)
    assert Percentiles.of(list(range(1, 201))) == Percentiles(100, 180, 198)


# Machines

@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("shape", MODELS)
def test_machines_are_described(name, shape):
    hardware, what = machine(name), model(shape)
    found = CostModel(describe(hardware, what, "int8"))
    assert found.linear(1) > what.layer_weights * what.weight_bits / 8 / hardware.device.bandwidth
    assert found.linear(4096) > 3 * found.linear(1)
    assert found.host_attention([4000] * 8) > found.device_attention([4000] * 8) * 0.5
    assert found.crossing(4) > 0 and host_pool(hardware, what, "int8") > host_pool(hardware, what) > 1000
    if device_pool(hardware, what):
        assert device_pool(hardware, what) * what.kv_bytes(16) + what.weight_bytes < hardware.device.memory


@pytest.mark.parametrize("part, name, values", [
    ("device", "bandwidth", (0, -1.0, math.inf, math.nan)), ("host", "flops", (0, math.nan)),
    ("host", "memory", (0, -1)), ("device", "call", (-1e-6, math.nan)), ("reach", "attention", (0, 1.5, math.nan)),
    ("", "link", (0, math.nan)), ("", "latency", (-1.0,)), ("model", "layers", (0, -2)),
    ("model", "weight_bits", (0, math.nan))])
def test_a_machine_that_cannot_be_is_refused(part, name, values):
    whole = machine("t4-8")
    of = {"": whole, "model": model("llama1b-q4"), "device": whole.device, "host": whole.host,
          "reach": whole.device.reach}[part]
    for value in values:
        with pytest.raises(InvalidRequestError, match=f"{name}="):
            replace(of, **{name: value})


def test_figures_of_a_datasheet():
    """Llama-2-7B has 6.74 billion weights and 512 KiB of KV per token; a T4 holds two or three sequences beside it."""
    shape = model("llama2-7b")
    assert shape.weight_bytes / 2 == pytest.approx(6.74e9, rel=0.01) and shape.kv_bytes(16) == 524288
    assert model("llama3.1-8b").weight_bytes / 2 == pytest.approx(8.03e9, rel=0.01)
    assert 500 < device_pool(machine("t4-16"), shape) < 1500
    assert device_pool(machine("rtx4060"), shape) == 0
    slow, fast = (describe(machine(name), shape) for name in ("t4-4", "t4-16"))
    assert CostModel(slow).host_attention([5000]) > 3.5 * CostModel(fast).host_attention([5000])
    assert describe(machine("apple-m1-max"), shape).contention_host > 1
    for name, find in (("preset", machine), ("model", model)):
        with pytest.raises(InvalidRequestError, match=name):
            find("abacus")
    with pytest.raises(InvalidRequestError, match="kv="):
        describe(machine("t4-4"), shape, "int2")


def test_the_papers_smallest_setting():
    """Hybrid is several times as fast as the device alone, which holds two sequences, as both papers found."""
    from dataclasses import replace

    [outcome] = run([replace(T4, requests=40)], ("gpu-only", "neo", "apex"))
    assert 1.5 < outcome.ratio("neo") < 10
    assert outcome.ratio("apex", "neo") > 0.95
    assert outcome.results["gpu-only"].batch < 3 < outcome.results["neo"].batch


# The command

def command(*arguments: str):
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_the_command_prints_a_table():
    done = command("--preset", "t4-8", "--synthetic", "200,20", "--requests", "8", "--policy", "apex,gpu-only")
    assert done.exit_code == 0, done.output
    assert "808 tokens, 0.42 GB" in done.stdout and "gpu-only" in done.stdout and "8 requests" in done.stderr


def test_the_command_gives_json_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    trace, picture = tmp_path / "trace.csv", tmp_path / "deep" / "timeline.png"
    trace.write_text("prompt_tokens,output_tokens\n300,20\n400,30\n")
    done = command("--trace", str(trace), "--rate", "2", "--json", "--timeline", str(picture), "--policy", "neo,apex",
                   "--tbt-ms", "80")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [one["policy"] for one in found] == ["neo", "apex"] and all(one["tokens"] == 50 for one in found)
    assert found[0]["ttft"]["p50"] > 0 and "laps" not in found[0]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_a_measured_profile_is_simulated(tmp_path):
    from edge_runtime.offload.profile_store import Profile, Setting, save

    path = save(Profile(Setting("model", "onnx:cpu", "float32", "int8", 1, 1), {}, curves(), 1.0, (),
                        "2026-01-01T00:00:00"), tmp_path / "profile.json")
    done = command("--profile", str(path), "--pool-tokens", "4096", "--synthetic", "300,10", "--requests", "4")
    assert done.exit_code == 0, done.output
    assert "4,096 tokens" in done.stdout
    assert command("--profile", str(path)).exit_code == 2


@pytest.mark.parametrize("arguments, said, code", [
    (("--preset", "t5"), "t4-4", 2), (("--model", "gpt"), "llama2-7b", 2), (("--policy", "best"), "gpu-only", 2),
    (("--policy", ","), "policy", 2), (("--synthetic", "10"), "prompt and reply", 2), (("--rate", "-1"), "rate", 2),
    (("--requests", "0"), "requests", 2), (("--pool-tokens", "-5"), "pool_tokens", 2), (("--kv", "q2"), "kv", 2),
    (("--tbt-ms", "0"), "tbt_ms", 2), (("--timeline", "x.gif"), ".png", 2), (("--trace", "nowhere.csv"), "nowhere", 1),
    (("--rate", "1e-300"), "rate", 2), (("--synthetic", "9" * 5000 + ",1"), "prompt and reply", 2),
    (("--preset", "rtx4060"), "13.5 GB", 2), (("--profile", "nowhere.json", "--pool-tokens", "9"), "nowhere", 1),
])
def test_bad_input_is_told_in_one_line(arguments, said, code):
    done = command(*arguments)
    assert done.exit_code == code, done.output
    assert said in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
