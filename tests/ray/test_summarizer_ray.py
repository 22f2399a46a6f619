"""The summarizer on a local Ray cluster of two workers, one of which is killed in the middle."""
from __future__ import annotations

import json
import signal

import psutil
import pytest

from edge_runtime.apps.summarizer import Summarizer, Target
from edge_runtime.apps.summarizer.ray_pipeline import RaySummarizer
from edge_runtime.llm import LLM
from edge_runtime.sampling import SamplingParams
from tests.gguf_factory import write_model

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray")

OPTIONS = {"prompt": "Sum:\n{document}", "params": SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small.gguf", vocab=600, context_length=256)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"Report {i} tells of {i * 7 % 13} boats. " * (1 + i % 5))
    (folder / "30.txt").write_bytes(b"\0binary")
    return folder


@pytest.fixture(scope="module")
def whole(model, documents, tmp_path_factory):
    """What one process writes."""
    out = tmp_path_factory.mktemp("whole") / "o.jsonl"
    with LLM(model, threads=1) as llm:
        list(Summarizer(llm, **OPTIONS).run([documents], Target(out)))
    return out.read_bytes()


@pytest.fixture(scope="module")
def cluster():
    """A head without processors, and two nodes of one processor each."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False,
                                                          "object_store_memory": 100 << 20})
    for _ in range(2):
        found.add_node(num_cpus=1, object_store_memory=100 << 20)
    found.wait_for_nodes()
    yield found
    ray.shutdown()
    found.shutdown()


def workers() -> list[psutil.Process]:
    """Processes of our actors, which name themselves after the class."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::" in " ".join(process.info["cmdline"] or ()) and "_Worker" in " ".join(process.info["cmdline"]):
            found.append(process)
    return found


def test_a_worker_killed_in_the_middle_loses_nothing(model, documents, whole, cluster, tmp_path):
    out = tmp_path / "o.jsonl"
    job = RaySummarizer(cluster.address, model, {"threads": 1}, OPTIONS, share=6)
    killed = False
    for number, _ in enumerate(job.run([documents], Target(out))):
        if number >= 5 and not killed:
            alive = workers()
            assert len(alive) == 2, alive
            alive[0].send_signal(signal.SIGKILL)
            killed = True
    assert killed and out.read_bytes() == whole
    assert (job.totals.documents, job.totals.failed) == (60, 1)
    again = RaySummarizer(cluster.address, model, {"threads": 1}, OPTIONS)
    list(again.run([documents], Target(out)))
    assert again.totals.kept == 59 and out.read_bytes() == whole


def test_a_run_that_was_stopped_goes_on(model, documents, whole, cluster, tmp_path):
    out = tmp_path / "o.jsonl"
    first = RaySummarizer(cluster.address, model, {"threads": 1}, OPTIONS, share=6)
    entries = first.run([documents], Target(out))
    for _ in range(8):
        next(entries)
    entries.close()
    second = RaySummarizer(cluster.address, model, {"threads": 1}, OPTIONS, share=6)
    list(second.run([documents], Target(out)))
    assert second.totals.kept >= 7 and out.read_bytes() == whole


def test_batch_lines_are_answered_too(model, cluster, tmp_path):
    rows = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions",
             "body": {"prompt": f"Say {i}", "max_tokens": 4, "temperature": 0}} for i in range(20)]
    (tmp_path / "in.jsonl").write_text("\n".join([*map(json.dumps, rows), "{bad"]))
    job = RaySummarizer(cluster.address, model, {"threads": 1}, {}, share=8)
    list(job.run([tmp_path / "in.jsonl"], Target(tmp_path / "ray.jsonl", "batch")))
    with LLM(model, threads=1) as llm:
        list(Summarizer(llm, requests=True).run([tmp_path / "in.jsonl"], Target(tmp_path / "one.jsonl", "batch")))
    ours, theirs = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
                    for name in ("ray.jsonl", "one.jsonl"))
    assert ours == theirs and ours[20]["error"]["line"] == 21

