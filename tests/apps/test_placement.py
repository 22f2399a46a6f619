"""What apps tell of a hybrid device: the server's metrics and health, the chat's bar, the summarizer's report."""
from __future__ import annotations

import re
import threading

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime import LLM, SamplingParams, hybrid_model
from edge_runtime.apps.chat.events import Hub
from edge_runtime.apps.chat.models import Models
from edge_runtime.apps.chat.store import Store
from edge_runtime.apps.model_host import ModelHost
from edge_runtime.apps.server.metrics import Metrics
from edge_runtime.apps.summarizer.asks import Ask
from edge_runtime.apps.summarizer.backend import LocalBackend
from edge_runtime.apps.summarizer.report import Totals, closing_report
from edge_runtime.offload import profile_store
from tests.edge_runtime.llms import lose_device

LONG = "The river was long and the town was old. " * 12
OPTIONS = dict(device="onnx:cpu", context=512, offload="on", kv="fp16", device_memory=40 << 20, max_batch=4, threads=2)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(hybrid_model, "PROFILE_SECONDS", 0.6)
    folder = tmp_path_factory.mktemp("profiles")
    patch.setattr(profile_store, "folder", lambda: folder)
    with LLM(**OPTIONS) as llm:
        llm.generate(LONG, max_tokens=8, ignore_eos=True)  # its prompt stays, as a cached prefix
        yield llm
    patch.undo()


def test_metrics_tell_mode_and_memories(llm):
    text = Metrics().text(ModelHost.of(llm, "tiny"), 0)
    values = dict(re.findall(r"^(edge_\S+) (\S+)$", text, re.M))
    status = llm.status()
    assert values[f'edge_mode_info{{mode="{status.mode}"}}'] == "1"
    assert int(values['edge_kv_bytes{memory="host"}']) == status.pages_used * status.page_bytes > 0
    assert int(values['edge_kv_bytes{memory="device"}']) == status.device_kv_bytes
    assert int(values['edge_kv_budget_bytes{memory="device"}']) == llm.plan.on_device.kv_pool_bytes
    laps = {mode: int(count) for mode, count in re.findall(r'^edge_laps_total\{mode="([\w-]+)"\} (\d+)$', text, re.M)}
    assert laps == status.placement.modes and sum(laps.values()) >= 7
    assert values["edge_devices_lost_total"] == "0" and float(values["edge_prediction_error_ratio"]) >= 0
    names = re.findall(r"^# TYPE (\S+)", text, re.M)
    assert len(set(names)) == len(names) and {line.split("{")[0].split(" ")[0] for line in text.splitlines()
                                              if not line.startswith("#")} <= {
        name + end for name in names for end in ("", "_bucket", "_sum", "_count")}


def test_the_chats_bar_shows_the_devices_share(llm, tmp_path):
    store = Store(tmp_path)
    models = Models(ModelHost.of(llm, "tiny"), store, Hub())
    seen = []
    with llm.stream("Hello", max_tokens=200, ignore_eos=True) as stream:
        for _ in stream:
            seen.append(models.kv())
    store.close()
    status = llm.status()
    assert all(one["budget"] == status.host_kv_budget + status.device_kv_budget and one["on"] == "onnx:cpu"
               for one in seen)
    assert any(one["device"] > 0 and one["host"] > 0 for one in seen)
    assert {one["mode"] for one in seen} <= {"device-only", "synchronous", "pipelined", "overlap", "streaming"}


def test_the_chat_is_told_of_a_lost_device(llm, tmp_path):
    store = Store(tmp_path)
    with LLM(**OPTIONS) as other:  # it ends with another device than it began with
        models = Models(ModelHost.of(other, "tiny"), store, Hub())
        seen = []
        lose_device(other, segments=60)  # in the middle of the reply
        with other.stream("Hello", max_tokens=100, ignore_eos=True) as stream:
            for _ in stream:
                seen.append(models.kv()["lost"])
        found = models.kv()
    store.close()
    assert len(seen) > 20 and seen[0] == 0 and sorted(seen) == seen and seen[-1] == 1
    assert (found["planned"], found["on"], found["lost"]) == ("onnx:cpu", "onnx:cpu", 1)


def test_a_host_plans_and_opens_with_the_options_of_its_models(llm):
    host, told = ModelHost(pulled=tuple, **{**OPTIONS, "threads": 3}), []
    plan = host.plan("edge-tiny")
    assert plan.hybrid and plan.on_device == llm.plan.on_device
    opened = host.load(progress=told.append)
    try:
        assert opened.status().placement is not None and opened.plan.on_device == plan.on_device
        measured = [one.detail for one in told if one.stage == "measure"]
        assert measured and not any("profile: " in detail for detail in measured)
    finally:
        host.close()


def test_the_report_counts_the_laps_of_each_mode(llm):
    backend, totals = LocalBackend(llm), Totals()
    before = dict(llm.status().placement.modes)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    for text in ("The river was long.", "The town was old."):
        ask = Ask("chat", ({"role": "user", "content": text},), params)
        answer = backend.ask(ask, threading.Event(), lambda count: None)
        totals.answered(answer, 0)
    after = llm.status().placement.modes
    laps = {mode: after[mode] - before.get(mode, 0) for mode in after if after[mode] > before.get(mode, 0)}
    assert totals.extra["mode"] == laps and sum(laps.values()) >= 14
    report = closing_report(totals)
    assert all(f"{mode}: {count}" in report for mode, count in laps.items())
