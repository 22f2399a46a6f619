"""A model whose weights are on an accelerator and whose KV is on the host: see `devices.base.Device`.

The host's pages are the home of all KV; the device holds copies of what its own attention reads (`copies.py`). Before
every lap the scheduler (`apex.py`) says which decoding rows attend where, and in which mode; prompts go side by side
before them, on the device where there is room for their KV. A lost device loses nothing: the step is run again on
another one, from the same pages.
"""
from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edge_runtime.devices.accelerator import Accelerator, AttendPart
from edge_runtime.devices.base import PAGE_TOKENS, KVLayout, SequenceSlice, Step, StepResult
from edge_runtime.errors import DeviceError, DeviceLostError, TokenizerError
from edge_runtime.models.config import ModelConfig
from edge_runtime.offload.choices import Choice, Mode, Row
from edge_runtime.offload.copies import DeviceCopies
from edge_runtime.offload.flow import Flow, Processors, Rows
from edge_runtime.offload.host_attention import HostAttention
from edge_runtime.offload.host_rows import HostRows, HostSlice
from edge_runtime.offload.laps import lockstep, overlap, pipelined
from edge_runtime.offload.overlap_meter import OverlapMeter
from edge_runtime.offload.streaming import StreamedFlow

LOG = logging.getLogger("edge_runtime")
BRING_TOKENS = 4 * PAGE_TOKENS  # of one sequence to the device per lap: the lap grows by a few milliseconds
LAPS_KEPT = 512


class Scheduler(Protocol):
    """Decides about every lap: `apex.Apex`."""

    cost: Any

    def choose(self, rows: Sequence[Row], pool_tokens: int) -> Choice: ...

    def measured(self, choice: Choice, seconds: float, tokens: int) -> None: ...


@dataclass(frozen=True)
class LapRecord:
    """One lap as it went. tokens: decoding rows that it finished. seconds of the lap; predicted: by the cost model."""

    mode: Mode
    rows: int
    on_device: int
    on_host: int
    tokens: int
    predicted: float
    seconds: float
    bound_by: str


@dataclass(frozen=True)
class HybridStatus:
    """What is where. mode: of the last lap, None before the first. device_tokens: KV copies on the device;
    pool_tokens: what fits there. modes: laps by mode. error: median of |predicted / measured - 1|. device: what does
    the matrix work now, after a loss another one. laps: the latest."""

    device: str
    mode: Mode | None
    device_tokens: int
    pool_tokens: int
    modes: dict[str, int]
    error: float
    lost: int
    laps: tuple[LapRecord, ...]


@dataclass(eq=False)
class _Result:
    """Rows computed so far in a step, by the index of their slice."""

    logits: dict[int, np.ndarray] = field(default_factory=dict)
    hidden: dict[int, np.ndarray] = field(default_factory=dict)

    def step_result(self, step: Step, vocabulary: int) -> StepResult:
        finished = tuple(sorted(self.logits))
        logits = [self.logits[i] for i in finished if len(self.logits[i])]
        hidden = [self.hidden[i] for i in finished if step.slices[i].hidden]
        return StepResult(np.concatenate(logits) if logits else np.empty((0, vocabulary), np.float32),
                          np.concatenate(hidden) if hidden else None,
                          finished=None if len(finished) == len(step.slices) else finished)


class HybridDevice:
    """apex: decides about every lap. kv: type of the host's pages. host_threads, host_cores: of the host's attention.
    reopen: gives an accelerator that takes over when this one is lost; None: the error goes to the requests.

    A row's logits depend on its own sequence, up to the rounding of the side that attends.
    """

    def __init__(self, accelerator: Accelerator, config: ModelConfig, apex: Scheduler, *, kv: str = "int8",
                 host_threads: int = 1, host_cores: tuple[int, ...] = (), max_rows: int | None = None,
                 reopen: Callable[[], Accelerator] | None = None):
        self.config, self.apex = config, apex
        self.kv_layout = KVLayout(config.layers, config.kv_heads, config.head_size, kv)
        self.vocab_size = accelerator.vocab_size
        self.max_rows = max_rows or accelerator.capabilities.max_rows
        self.meter = OverlapMeter()
        self._accelerator, self._reopen = accelerator, reopen
        self._host = HostAttention(config, self.kv_layout, threads=host_threads, cores=host_cores)
        self._writer = HostAttention(config, self.kv_layout, cores=host_cores, name="edge-runtime-writer")
        self._by = Processors(accelerator, self._host, self._writer, config, self.meter)
        self._copies = DeviceCopies(accelerator, self.kv_layout)
        self._cohorts: list[Flow] = []
        self._positions: dict[int, int] = {}  # of flying sequences
        self._writing: list[Future[None]] = []
        self._modes: Counter[str] = Counter()
        self._laps: deque[LapRecord] = deque(maxlen=LAPS_KEPT)
        self._lost = self._held = 0

    @property
    def accelerator(self) -> Accelerator:
        return self._accelerator

    def run(self, step: Step) -> StepResult:
        """Computes a step, or as much of it as the scheduler gives this lap; see `devices.base.Device.run`."""
        if step.rows > self.max_rows:
            raise DeviceError(f"a step of {step.rows} rows: this device takes {self.max_rows}")
        for part in step.slices:
            if part.exit is not None:
                raise DeviceError('early exit is not computed on ONNX devices: use device="cpu"')
            ids = part.token_ids
            if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
                bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
                raise TokenizerError(f"token id {bad}: this model's are 0 to {self.vocab_size - 1}")
        try:
            return self._accelerator.submit(lambda: self._run(step)).result()
        except DeviceLostError as error:
            self._replace(error)
            return self._accelerator.submit(lambda: self._run(step)).result()

    def forget(self, key: int) -> None:
        """See `devices.base.Device`."""
        self._accelerator.submit(lambda: self._forget(key)).result()

    def status(self) -> HybridStatus:
        """From any thread; figures of the last lap."""
        laps = tuple(self._laps)
        return HybridStatus(self._accelerator.capabilities.name, laps[-1].mode if laps else None, self._held,
                            self._copies.pool_tokens, dict(self._modes), self.apex.cost.error, self._lost, laps)

    def close(self) -> None:
        self._drop_flying()
        self._accelerator.close()
        self._host.close()
        self._writer.close()

    # The accelerator's thread

    def _run(self, step: Step) -> StepResult:
        result = _Result()
        prompts = [i for i, s in enumerate(step.slices) if _is_prompt(s)]
        decoding = [i for i, s in enumerate(step.slices) if not _is_prompt(s)]
        try:
            if prompts:
                self._prompts(step, prompts, result)
            if decoding:
                self._decode(step, decoding, result)
            while not result.logits and step.slices:  # cohorts are on their way, and nobody else is there
                self._decode(step, decoding, result)
            self._await_writing()
        except BaseException:
            self._drop_flying()  # they come again with the next step
            self._host.drain()
            self._writer.drain()
            raise
        self._held = self._copies.held
        return result.step_result(step, self.vocab_size)

    def _prompts(self, step: Step, indices: Sequence[int], result: _Result) -> None:
        here = [i for i in indices if self._prompt_room(step.slices[i])]
        away = [i for i in indices if i not in here]
        order = here + away
        slices = [step.slices[i] for i in order]
        flow = Flow(self._by, self._rows(slices[:len(here)], slices[len(here):]))
        lockstep(self._by, flow)
        self._end([flow], step, order, result)

    def _prompt_room(self, s: SequenceSlice) -> bool:
        """Whether a prompt's rows attend on the device: its KV so far is there, or comes now, and the new fits too."""
        end, copies = s.position + len(s.token_ids), self._copies
        if copies.tokens(s.key, s.position) < s.position and not (s.key in copies or copies.fits(end)):
            return False
        if not copies.room(s.key, end + 1):
            return False
        copies.fill(s.key, s.pages, s.position)
        return copies.tokens(s.key, s.position) == s.position

    def _decode(self, step: Step, indices: Sequence[int], result: _Result) -> None:
        """One lap for decoding rows."""
        by_key = {step.slices[i].key: step.slices[i] for i in indices if i not in result.logits}
        choice = self.apex.choose([self._row(s) for s in by_key.values()], self._copies.pool_tokens)
        for key in choice.evict:
            self._copies.drop(key)
        began = time.perf_counter()
        flows = self._lap(choice, by_key)
        done = [flow for flow in flows if flow.layer == self._accelerator.layers]
        self._end(done, step, indices, result)
        seconds = time.perf_counter() - began
        tokens = sum(flow.rows.count for flow in done)
        self.apex.measured(choice, seconds, tokens)
        self._modes[choice.mode.value] += 1
        self._laps.append(LapRecord(choice.mode, len(by_key), len(choice.device), len(choice.host) + len(choice.split),
                                    tokens, choice.predicted, seconds, choice.bound_by))
        for key in choice.bring:
            self._bring(by_key[key], choice.wanted.get(key, by_key[key].position))

    def _lap(self, choice: Choice, by_key: dict[int, SequenceSlice]) -> list[Flow]:
        """Runs it; returns the flows that took part."""
        here = [key for key in choice.device if self._may_attend(by_key[key])]
        device = [by_key[key] for key in here]
        host = [by_key[key] for key in (*choice.host, *choice.split, *choice.device)
                if key not in here and key not in self._positions]
        if choice.mode is Mode.OVERLAP or self._cohorts:
            return self._overlap(device, host, drain=choice.mode is not Mode.OVERLAP)
        if choice.mode is Mode.STREAMING and host:
            flow: Flow = StreamedFlow(self._by, self._rows(device, host, stored=True), read=self._writer.call)
            lockstep(self._by, flow)
            return [flow]
        if choice.mode is Mode.PIPELINED and host:
            first = [s for s in host if s.key in choice.first]
            second = [s for s in host if s.key not in choice.first]
            if second and (first or device):
                flows = [Flow(self._by, self._rows(device, first)), Flow(self._by, self._rows([], second))]
                pipelined(self._by, *flows)
                return flows
        flow = Flow(self._by, self._rows(device, host, choice.split))
        lockstep(self._by, flow)
        return [flow]

    def _overlap(self, device: list[SequenceSlice], host: list[SequenceSlice], drain: bool) -> list[Flow]:
        """The rows that are not under way start a cohort, as many as keep the cohorts one layer apart."""
        if host and not drain:
            flying = sum(len(flow.rows.keys) for flow in self._cohorts)
            size = -(-(flying + len(host)) // self._accelerator.layers)
            cohort = Flow(self._by, self._rows([], host[:size]))
            self._cohorts.append(cohort)
            self._positions.update({s.key: s.position for s in host[:size]})
        flow = Flow(self._by, self._rows(device, [])) if device else None
        overlap(self._by, flow, self._cohorts, drain=drain)
        done = [c for c in self._cohorts if c.layer == self._accelerator.layers]
        self._cohorts = [c for c in self._cohorts if c not in done]
        for cohort in done:
            for key in cohort.rows.keys:
                self._positions.pop(key, None)
        return [*([flow] if flow is not None else []), *done]

    def _rows(self, device: Sequence[SequenceSlice], host: Sequence[SequenceSlice],
              split: dict[int, int] | None = None, stored: bool = False) -> Rows:
        """stored: the host's rows are only written to its pages by the lap, not attended over."""
        everyone = [*device, *host]
        parts = tuple(AttendPart(self._copies[s.key], len(s.token_ids)) for s in device)
        on_host, partial, first = [], [], 0
        for s in host:
            skip = self._skip(s, (split or {}).get(s.key, 0))
            on_host.append(HostSlice(s.pages, s.position, len(s.token_ids), _is_prompt(s), skip))
            if skip:
                partial.append((first, len(s.token_ids), self._copies[s.key]))
            first += len(s.token_ids)
        written = [HostSlice(s.pages, s.position, len(s.token_ids), _is_prompt(s))
                   for s in (everyone if stored else device)]
        return Rows(
            keys=tuple(s.key for s in everyone), counts=tuple(len(s.token_ids) for s in everyone),
            ids=np.concatenate([s.token_ids for s in everyone]).astype(np.int64),
            positions=np.concatenate([np.arange(s.position, s.position + len(s.token_ids)) for s in everyone]),
            parts=parts, stored=HostRows(self.config, written) if written else None,
            host=HostRows(self.config, on_host) if on_host else None, partial=tuple(partial))

    def _skip(self, s: SequenceSlice, wanted: int) -> int:
        """Leading tokens of a split row that the device attends over: whole pages that it holds."""
        skip = min(wanted, self._copies.tokens(s.key, s.position)) // PAGE_TOKENS * PAGE_TOKENS
        if skip:
            self._copies[s.key].length = skip
        return skip

    def _end(self, flows: Sequence[Flow], step: Step, indices: Sequence[int], result: _Result) -> None:
        """One head for all flows that came to the last layer; what was computed is noted. Their slices are among
        `indices` of the step; rows of sequences that are not have ended meanwhile."""
        if not flows:
            return
        by_key = {step.slices[i].key: i for i in indices}
        wanted: list[int] = []
        logit_rows: list[int] = []
        spans: list[tuple[int, slice, slice]] = []
        first = 0
        for flow in flows:
            for part in flow.rows.parts:
                part.sequence.length += part.count
            flow.store()
            self._writing += flow.writing
            for key, n in zip(flow.rows.keys, flow.rows.counts):
                rows, first = range(first, first + n), first + n
                if key not in by_key:
                    continue
                s = step.slices[by_key[key]]
                shown = {"all": n, "last": 1, "none": 0}[s.logits]
                kept = rows if s.hidden else rows[n - shown:]
                hidden = slice(len(wanted), len(wanted) + len(kept))
                logits = slice(len(logit_rows), len(logit_rows) + shown)
                wanted += kept
                logit_rows += range(len(wanted) - shown, len(wanted))
                spans.append((by_key[key], logits, hidden))
        a = self._accelerator
        with self.meter.device():
            x, attended = (a.join([getattr(flow, name) for flow in flows]) for name in ("x", "attended"))
            states, scores = a.head(x, attended, np.array(wanted, np.int64), np.array(logit_rows, np.int64))
        for i, logits, hidden in spans:
            result.logits[i], result.hidden[i] = scores[logits], states[hidden]

    def _row(self, s: SequenceSlice) -> Row:
        flying = next((flow.layer for flow in self._cohorts if s.key in flow.rows.keys), -1)
        return Row(s.key, s.position + 1, self._copies.tokens(s.key, s.position), s.interactive, flying)

    def _may_attend(self, s: SequenceSlice) -> bool:
        """Whether a row's copy is whole and has room for its token; without room it leaves the device."""
        if s.key in self._positions or self._copies.tokens(s.key, s.position) < s.position or s.key not in self._copies:
            return False
        if self._copies.room(s.key, s.position + 1):
            return True
        self._copies.drop(s.key)
        return False

    def _bring(self, s: SequenceSlice, until: int) -> None:
        until = min(until, s.position)
        if self._copies.room(s.key, max(until, s.position + 1) if until == s.position else until):
            self._copies.fill(s.key, s.pages, until, BRING_TOKENS)

    def _forget(self, key: int) -> None:
        self._copies.drop(key)
        if key in self._positions:
            # Its cohort begins anew without it: the others lose the layers they had, and nothing else.
            for cohort in [c for c in self._cohorts if key in c.rows.keys]:
                self._stop(cohort)

    def _stop(self, cohort: Flow) -> None:
        if cohort.in_flight is not None:
            cohort.in_flight.exception()  # waits: the host must not touch pages that are given back
        self._cohorts.remove(cohort)
        for key in cohort.rows.keys:
            self._positions.pop(key, None)

    def _drop_flying(self) -> None:
        for cohort in list(self._cohorts):
            self._stop(cohort)

    def _await_writing(self) -> None:
        """The host's pages hold what this step computed before anybody may share or free them."""
        writing, self._writing = self._writing, []
        for future in writing:
            future.result()

    def _replace(self, error: DeviceLostError) -> None:
        """Another accelerator takes over, with no copies; raises the error where there is none."""
        self._drop_flying()
        self._writing.clear()
        if self._reopen is None:
            raise error
        lost = self._accelerator
        self._accelerator = self._reopen()
        self._lost += 1
        LOG.warning("%s. %s goes on with the same sequences: their KV is on the host.", error,
                    self._accelerator.capabilities.name)
        self._copies.forget_all(self._accelerator)
        self._by = Processors(self._accelerator, self._host, self._writer, self.config, self.meter)
        try:
            lost.close()
        except Exception as trouble:
            LOG.warning("closing the lost device: %s", trouble)


def _is_prompt(s: SequenceSlice) -> bool:
    return s.prompt or len(s.token_ids) != 1
