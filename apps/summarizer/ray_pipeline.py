"""The same job on Ray Data: a worker per node runs the pipeline on its share, this process keeps ledger and order.

Ray starts a worker that dies again and gives its share to whoever is free; what a share had done is computed again,
what came back before is in the ledger.
"""
from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from edge_runtime.apps.summarizer.errors import JobError
from edge_runtime.apps.summarizer.ledger import Entry
from edge_runtime.apps.summarizer.order import InOrder
from edge_runtime.apps.summarizer.report import Totals
from edge_runtime.apps.summarizer.sources import Item, Source, source_of
from edge_runtime.apps.summarizer.summarizer import Summarizer, Target, output_of
from edge_runtime.errors import EdgeRuntimeError, MissingExtraError
from edge_runtime.loading import fingerprint, resolve

END_SECONDS = 2.0  # that threads of Ray Data may take to end; one that only polls stays
SHARE = 64  # documents that a worker takes at once: two full batches


class RaySummarizer:
    """`Summarizer.run` on Ray. address: "local" for a cluster of this machine's, "auto" or host:port for one that
    runs. model, loading: as `LLM` takes them; the file must lie at the same path on every node. options: as
    `Summarizer` takes them. workers: None: one for each node. Raises MissingExtraError, JobError."""

    def __init__(self, address: str, model: Path | None, loading: dict[str, Any], options: dict[str, Any], *,
                 workers: int | None = None, share: int = SHARE):
        try:
            import pyarrow
            import ray
            import ray.data
        except ImportError as error:
            raise MissingExtraError("ray", "ray", "--ray") from error
        self._ray, self._arrow = ray, pyarrow
        self.address, self.model, self.loading, self.options = address, model, loading, options
        self.workers, self.share = workers, share
        self.totals = Totals()

    def run(self, source: Source | Iterable[str | Path], target: Target | None = None, *,
            fresh: bool = False) -> Generator[Entry, None, None]:
        """See `Summarizer.run`. What fails in a worker is an entry with an error."""
        target = target or Target()
        found: Source = source if hasattr(source, "batch") else source_of(  # type: ignore[assignment]
            [Path(path) for path in source], target.files)
        target.refuse_inputs(getattr(found, "paths", ()))
        self.totals = Totals()
        path = resolve(self.model)
        manifest = {"model": fingerprint(path), "loading": repr(self.loading), "options": repr(self.options),
                    "format": target.form, "batch": found.batch, "ray": True}
        ledger = target.open_ledger(manifest, fresh)
        started = False
        try:
            order = InOrder(ledger, output_of(found, target, ledger, path.stem), self.totals,
                            unique_names=found.batch)
            order.open()
            started = self._connect()
            yield from self._run(found, order)
        finally:
            self.totals.ended = time.perf_counter()
            ledger.close()
            if started:
                self._ray.shutdown()

    def _connect(self) -> bool:
        """Whether the connection is ours to close."""
        ray = self._ray
        if ray.is_initialized():
            return False
        options: dict[str, Any] = {} if self.address == "local" else {"address": self.address}
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning", **options)
        except Exception as error:
            raise JobError(f"--ray {self.address}: {type(error).__name__}: {' '.join(str(error).split())}") from error
        return True

    def _run(self, source: Source, order: InOrder) -> Generator[Entry, None, None]:
        shares = []
        names: dict[int, str] = {}
        for share in self._shares(source, order, names):
            shares.append(self._ray.put(share))  # in Ray's store, which spills to disk: not in this process
            yield from order.drain()
        yield from order.drain()
        if shares:
            yield from self._answers(shares, source, order, names)
        yield from order.drain()
        order.output.close()

    def _answers(self, shares: list[Any], source: Source, order: InOrder,
                 names: dict[int, str]) -> Generator[Entry, None, None]:
        ray = self._ray
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        if not nodes:
            raise JobError(f"--ray {self.address}: no node of the cluster has a processor to give")
        workers = min(self.workers or len(nodes), len(shares))
        cores = min(int(node["Resources"]["CPU"]) for node in nodes)
        dataset = ray.data.from_arrow_refs(shares).map_batches(
            _Worker, batch_size=None, concurrency=workers, num_cpus=cores,
            fn_constructor_kwargs={"model": None if self.model is None else str(self.model), "loading": self.loading,
                                   "options": self.options, "batch": source.batch, "created": source.created})
        before = set(threading.enumerate())
        rows = iter(dataset.iter_rows())
        try:
            for row in rows:
                told = json.loads(row["told"])
                totals = self.totals
                for name in ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "retried"):
                    setattr(totals, name, getattr(totals, name) + told.get(name, 0))
                document = int(row["document"])
                order.finish(document, names.pop(document, ""), told["result"], told["error"], told["seconds"])
                yield from order.drain()
        except ray.exceptions.RayError as error:
            raise JobError(f"--ray {self.address}: {' '.join(str(error).split())[:1000]}. What is done is kept; give "
                           f"the same command again.") from error
        finally:
            _end_execution(rows, set(threading.enumerate()) - before)

    def _shares(self, source: Source, order: InOrder, names: dict[int, str]) -> Iterator[Any]:
        """Arrow tables of the items whose jobs are to run."""
        rows: list[tuple[int, Item]] = []
        document = -1
        for document, item in enumerate(source):
            if order.admit(document, item):
                names[document] = item.name
                rows.append((document, item))
            if len(rows) == self.share:
                yield self._table(rows)
                rows = []
        order.end(document + 1)
        if rows:
            yield self._table(rows)

    def _table(self, rows: list[tuple[int, Item]]) -> Any:
        return self._arrow.table({
            "document": [document for document, _ in rows],
            "item": self._arrow.array([json.dumps({"name": item.name, "hash": item.hash.hex(), "text": item.text,
                                                   "request": item.request, "line": item.line})
                                       for _, item in rows], self._arrow.large_string())})


def _end_execution(rows: Iterator[Any], threads: set[threading.Thread]) -> None:
    """Ends what Ray Data began for a run, also for one that was left early: its executor and the threads that fetch
    ahead would go on, and where one of them finds the connection closed, Ray ends the process without a word."""
    close = getattr(rows, "close", None)
    if callable(close):
        close()
    for thread in threads:
        shutdown = getattr(thread, "shutdown", None)
        if callable(shutdown):
            shutdown(force=True)
    until = time.monotonic() + END_SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


class _Worker:
    """An actor of Ray: a model, and the pipeline over each share."""

    def __init__(self, model: str | None, loading: dict[str, Any], options: dict[str, Any], batch: bool, created: int):
        from edge_runtime.llm import LLM

        try:
            self.llm = LLM(model, **loading)
            self.summarizer = Summarizer(self.llm, **{**options, "requests": batch})
        except EdgeRuntimeError as error:  # Ray carries no exception whose constructor it does not know
            raise RuntimeError(str(error)) from None
        self.batch, self.created = batch, created

    def __call__(self, share: dict[str, Any]) -> dict[str, Any]:
        items = [Item(told["name"], bytes.fromhex(told["hash"]), told["text"], told["request"], told["line"])
                 for told in map(json.loads, share["item"])]
        source = _Share(items, self.batch, self.created)
        rows = []
        before: dict[str, int] = {}
        for entry in self.summarizer.run(source):
            totals = self.summarizer.totals
            counts = {name: getattr(totals, name) for name in ("requests", "prompt_tokens", "completion_tokens",
                                                               "cached_tokens", "retried")}
            rows.append(json.dumps({"result": entry.result, "error": entry.error, "seconds": entry.seconds,
                                    **{name: value - before.get(name, 0) for name, value in counts.items()}}))
            before = counts
        return {"document": share["document"], "told": rows}


class _Share:
    def __init__(self, items: list[Item], batch: bool, created: int):
        self.items, self.batch, self.created = items, batch, created

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def count(self) -> int:
        return len(self.items)
