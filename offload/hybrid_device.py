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
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from edge_runtime.devices.accelerator import Accelerator, AttendPart
from edge_runtime.devices.base import PAGE_TOKENS, KVLayout, SequenceSlice, Step, StepResult
from edge_runtime.errors import DeviceError, DeviceLostError, EngineStoppedError, OutOfMemoryError, TokenizerError
from edge_runtime.models.config import ModelConfig
from edge_runtime.offload.allowance import Allowance
from edge_runtime.offload.choices import Choice, Mode, Row
from edge_runtime.offload.cohorts import Cohorts
from edge_runtime.offload.copies import DeviceCopies
from edge_runtime.offload.flow import Flow, Processors, Rows
from edge_runtime.offload.host_attention import HostAttention
from edge_runtime.offload.host_rows import HostRows, HostSlice
from edge_runtime.offload.hybrid_status import HybridStatus, LapRecord
from edge_runtime.offload.laps import lockstep, overlap, pipelined
from edge_runtime.offload.overlap_meter import OverlapMeter
from edge_runtime.offload.step_rows import StepRows, is_prompt, logit_rows, pieces
from edge_runtime.offload.streaming import StreamedFlow

LOG = logging.getLogger("edge_runtime")
BRING_TOKENS = 4 * PAGE_TOKENS  # of one sequence to the device per lap: the lap grows by a few milliseconds
LAPS_KEPT = 512
LOSSES = 2  # devices that may go one after the other in one step


class Scheduler(Protocol):
    """Decides about every lap: `apex.Apex`."""

    cost: Any

    def choose(self, rows: Sequence[Row], pool_tokens: int) -> Choice: ...

    def measured(self, choice: Choice, seconds: float, tokens: int) -> None: ...


class HybridDevice:
    """apex: decides about every lap. kv: type of the host's pages. host_threads, host_cores: of the host's attention.
    reopen: gives an accelerator that takes over when this one is lost; None: the error goes to the requests.
    reschedule: gives the scheduler for that one, since what the lost device took tells nothing of it; None: `apex`
    stays.

    A row's logits depend on its own sequence, up to the rounding of the side that attends.
    """

    def __init__(self, accelerator: Accelerator, config: ModelConfig, apex: Scheduler, *, kv: str = "int8",
                 host_threads: int = 1, host_cores: tuple[int, ...] = (), max_rows: int | None = None,
                 reopen: Callable[[], Accelerator] | None = None,
                 reschedule: Callable[[Accelerator], Scheduler] | None = None):
        self.config, self.apex = config, apex
        self.kv_layout = KVLayout(config.layers, config.kv_heads, config.head_size, kv)
        self.vocab_size = accelerator.vocab_size
        self.max_rows = max_rows or accelerator.capabilities.max_rows
        self.meter = OverlapMeter()
        self._accelerator, self._reopen, self._reschedule = accelerator, reopen, reschedule
        self._host = HostAttention(config, self.kv_layout, threads=host_threads, cores=host_cores)
        self._writer = HostAttention(config, self.kv_layout, cores=host_cores, name="edge-runtime-writer")
        self._by = Processors(accelerator, self._host, self._writer, config, self.meter)
        self._copies = DeviceCopies(accelerator, self.kv_layout)
        self._cohorts = Cohorts()
        self._allowance = Allowance(self.max_rows)
        self._writing: list[Future[None]] = []
        self._modes: Counter[str] = Counter()
        self._laps: deque[LapRecord] = deque(maxlen=LAPS_KEPT)
        self._lost = self._short = self._held = 0

    @property
    def accelerator(self) -> Accelerator:
        return self._accelerator

    def run(self, step: Step) -> StepResult:
        """Computes a step, or as much of it as the scheduler gives this lap; see `devices.base.Device.run`."""
        if step.rows > self.max_rows:
            raise DeviceError(f"a step of {step.rows} rows: this device takes {self.max_rows}")
        if len({part.key for part in step.slices}) != len(step.slices):
            raise DeviceError(f"slices of keys {[part.key for part in step.slices]}: a sequence, by its key, has one")
        for part in step.slices:
            if part.exit is not None:
                raise DeviceError('early exit is not computed on ONNX devices: use device="cpu"')
            ids = part.token_ids
            if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
                bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
                raise TokenizerError(f"token id {bad}: this model's are 0 to {self.vocab_size - 1}")
        losses = 0
        while True:
            try:
                return self._accelerator.submit(lambda: self._run(step)).result()
            except DeviceLostError as error:
                losses += 1
                if losses > LOSSES:
                    raise
                self._replace(error)

    def forget(self, key: int) -> None:
        """See `devices.base.Device`. Raises nothing: what a failing device still holds goes with it."""
        with suppress(EngineStoppedError):
            self._accelerator.submit(lambda: self._forget(key)).result()

    def status(self) -> HybridStatus:
        """From any thread; figures of the last lap."""
        laps = tuple(self._laps)
        return HybridStatus(self._accelerator.capabilities.name, laps[-1].mode if laps else None, self._held,
                            self._copies.pool_tokens, dict(self._modes), self.apex.cost.error, self._lost, self._short,
                            laps)

    def close(self) -> None:
        """After the step that runs now."""
        with suppress(EngineStoppedError):
            self._accelerator.submit(self._cohorts.stop_all).result()
        self._accelerator.close()
        self._host.close()
        self._writer.close()

    # The accelerator's thread

    def _run(self, step: Step) -> StepResult:
        """The step, with less on the device where that runs out of memory."""
        again = False
        while True:
            try:
                return self._try(step)
            except OutOfMemoryError as error:
                if not self._shrink(step, error, again):
                    raise
                again = True

    def _try(self, step: Step) -> StepResult:
        done = StepRows(step)
        prompts = [s for s in step.slices if is_prompt(s)]
        decoding = [s for s in step.slices if not is_prompt(s)]
        rows = self._allowance.rows or max(1, step.rows)
        try:
            self._cohorts.stop_strays(step.slices)
            for batch in pieces(prompts, rows):
                self._prompts(batch, done)
            for first in range(0, len(decoding), rows):
                self._decode(decoding[first:first + rows], done)
            while not done.logits and decoding:  # cohorts are on their way, and nobody else is there
                self._decode(decoding, done)
            self._await_writing()
        except BaseException:
            self._abandon()
            raise
        self._held = self._copies.held
        self._allowance.worked(self._copies.pool_tokens)
        self._copies.limit = self._allowance.tokens
        return done.result(self.vocab_size)

    def _abandon(self) -> None:
        """A step failed: no thread touches pages any more; what was under way comes again with the next step."""
        self._cohorts.stop_all()
        self._host.drain()
        self._writer.drain()
        self._writing.clear()

    def _shrink(self, step: Step, error: OutOfMemoryError, again: bool) -> bool:
        """Less for the device. Whether to try again: where there is nothing smaller, once."""
        held = self._copies.taken()
        self._copies.drop_all()
        allowed = self._allowance.shrink(step.rows, held, again)
        self._copies.limit = self._allowance.tokens
        self._short += 1
        if allowed or not again:
            LOG.warning("%s: out of memory in a step; %s. (%s)", self._accelerator.capabilities.name,
                        allowed or "it is run once more", error)
        return bool(allowed) or not again

    def _prompts(self, slices: Sequence[SequenceSlice], done: StepRows) -> None:
        here = {s.key: s for s in slices if self._prompt_room(s)}
        flow = Flow(self._by, self._rows(tuple(here.values()), [s for s in slices if s.key not in here]))
        lockstep(self._by, flow)
        self._end([flow], slices, done)
        if self._allowance.rows is not None:
            self._await_writing()  # the next piece may read these pages

    def _prompt_room(self, s: SequenceSlice) -> bool:
        """Whether a prompt's rows attend on the device: its KV so far is there, or comes now, and the new fits too."""
        end, copies = s.position + len(s.token_ids), self._copies
        if copies.tokens(s.key, s.position) < s.position and not (s.key in copies or copies.fits(end)):
            return False
        if not copies.room(s.key, end + 1):
            return False
        copies.fill(s.key, s.pages, s.position)
        return copies.tokens(s.key, s.position) == s.position

    def _decode(self, slices: Sequence[SequenceSlice], done: StepRows) -> None:
        """One lap for decoding rows."""
        by_key = {s.key: s for s in slices if s.key not in done}
        pool = self._copies.pool_tokens - self._copies.taken(without=by_key)
        choice = self.apex.choose([self._row(s) for s in by_key.values()], max(0, pool))
        for key in choice.evict:
            self._copies.drop(key)
        moved = self._lap(choice, by_key, done)
        brought = self._bring(choice, by_key, done)
        if not moved and not brought and not done.logits:
            # The mode wants copies that find no room. Somebody must come to an end in every step.
            self._lap(Choice(Mode.SYNCHRONOUS, host=tuple(by_key), landing=True), by_key, done)

    def _lap(self, choice: Choice, by_key: dict[int, SequenceSlice], done: StepRows) -> bool:
        """Runs it; whether anything moved."""
        began = time.perf_counter()
        flows = self._flows(choice, by_key)
        ended = [flow for flow in flows if flow.layer == self._accelerator.layers]
        self._end(ended, tuple(by_key.values()), done)
        if not flows and not self._cohorts:
            return False
        seconds = time.perf_counter() - began
        tokens = sum(flow.rows.count for flow in ended)
        self.apex.measured(choice, seconds, tokens)
        self._modes[choice.mode.value] += 1
        self._laps.append(LapRecord(choice.mode, len(by_key), len(choice.device), len(choice.host) + len(choice.split),
                                    tokens, choice.predicted, seconds, choice.bound_by, choice.considered))
        return True

    def _flows(self, choice: Choice, by_key: dict[int, SequenceSlice]) -> list[Flow]:
        """Runs a lap; returns the flows that took part, of cohorts those that came to the end."""
        here = [key for key in choice.device if self._may_attend(by_key[key])]
        device = [by_key[key] for key in here]
        host = [by_key[key] for key in (*choice.host, *choice.split, *choice.device)
                if key not in here and key not in self._cohorts]
        whole = self._allowance.rows is None  # else a lap is for some of the step's rows, and no others may join it
        if self._cohorts or (choice.mode is Mode.OVERLAP and whole and (device or host)):
            return self._overlap(device, host, drain=choice.mode is not Mode.OVERLAP)
        if not device and not host:
            return []
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
        """The host's rows that are not under way start a cohort: the scheduler gives as many as it reckons with."""
        if host and not drain:
            self._cohorts.start(Flow(self._by, self._rows([], host)), host)
        flows = [Flow(self._by, self._rows(device, []))] if device else []
        overlap(self._by, flows[0] if flows else None, self._cohorts.flows, drain=drain)
        return [*flows, *self._cohorts.land(self._accelerator.layers)]

    def _rows(self, device: Sequence[SequenceSlice], host: Sequence[SequenceSlice],
              split: dict[int, int] | None = None, stored: bool = False) -> Rows:
        """stored: the host's rows are only written to its pages by the lap, not attended over."""
        everyone = [*device, *host]
        parts = tuple(AttendPart(self._copies[s.key], len(s.token_ids)) for s in device)
        on_host, partial, first = [], [], 0
        for s in host:
            skip = self._skip(s, (split or {}).get(s.key, 0))
            on_host.append(HostSlice(s.pages, s.position, len(s.token_ids), is_prompt(s), skip))
            if skip:
                partial.append((first, len(s.token_ids), self._copies[s.key]))
            first += len(s.token_ids)
        written = [HostSlice(s.pages, s.position, len(s.token_ids), is_prompt(s))
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

    def _end(self, flows: Sequence[Flow], slices: Sequence[SequenceSlice], done: StepRows) -> None:
        """One head for all flows that came to the last layer; what was computed is noted. Their slices are among
        `slices`; rows of sequences that are not have ended meanwhile."""
        if not flows:
            return
        by_key = {s.key: s for s in slices}
        wanted: list[int] = []
        chosen: list[int] = []
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
                shown = logit_rows(by_key[key])
                kept = rows if by_key[key].hidden else rows[n - shown:]
                hidden = slice(len(wanted), len(wanted) + len(kept))
                logits = slice(len(chosen), len(chosen) + shown)
                wanted += kept
                chosen += range(len(wanted) - shown, len(wanted))
                spans.append((key, logits, hidden))
        a = self._accelerator
        with self.meter.device():
            x, attended = (a.join([getattr(flow, name) for flow in flows]) for name in ("x", "attended"))
            states, scores = a.head(x, attended, np.array(wanted, np.int64), np.array(chosen, np.int64))
        for key, logits, hidden in spans:
            done.add(key, scores[logits], states[hidden])

    def _row(self, s: SequenceSlice) -> Row:
        return Row(s.key, s.position + 1, self._copies.tokens(s.key, s.position), s.interactive,
                   self._cohorts.layer(s.key))

    def _may_attend(self, s: SequenceSlice) -> bool:
        """Whether a row's copy is whole and has room for its token; without room it leaves the device."""
        if s.key in self._cohorts or self._copies.tokens(s.key, s.position) < s.position or s.key not in self._copies:
            return False
        if self._copies.room(s.key, s.position + 1):
            return True
        self._copies.drop(s.key)
        return False

    def _bring(self, choice: Choice, by_key: dict[int, SequenceSlice], done: StepRows) -> int:
        """KV to the device, by pages, up to the token that this lap computed. Returns how many tokens came."""
        brought = 0
        if choice.bring:
            self._await_writing()
        for key in choice.bring:
            s = by_key[key]
            held = s.position + (key in done)
            until = min(choice.wanted.get(key, held), held)
            if self._copies.tokens(key, held) < until and self._copies.room(key, until + (until == held)):
                brought += self._copies.fill(key, s.pages, until, BRING_TOKENS)
        return brought

    def _forget(self, key: int) -> None:
        self._cohorts.stop(key)
        try:
            self._copies.drop(key)
        except Exception as error:
            LOG.warning("giving back KV on the device: %s", error)

    def _await_writing(self) -> None:
        """The host's pages hold what this step computed before anybody may share or free them."""
        writing, self._writing = self._writing, []
        for future in writing:
            future.result()

    def _replace(self, error: DeviceLostError) -> None:
        """Another accelerator takes over, with no copies; raises the error where there is none."""
        if self._reopen is None:
            raise error
        lost = self._accelerator
        try:
            fresh = self._reopen()
        except Exception as trouble:
            raise DeviceLostError(f"{str(error).rstrip('.')}. No other device takes over: {trouble}") from trouble
        if self._reschedule is not None:
            self.apex = self._reschedule(fresh)
        self._accelerator = fresh
        self._lost += 1
        LOG.warning("%s. %s goes on with the same sequences: their KV is on the host.", str(error).rstrip("."),
                    fresh.capabilities.name)
        self._copies.forget_all(fresh)
        self._by = Processors(fresh, self._host, self._writer, self.config, self.meter)
        try:
            lost.close()
        except Exception as trouble:
            LOG.warning("closing the lost device: %s", trouble)
