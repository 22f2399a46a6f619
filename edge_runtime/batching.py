"""Continuous batching: which rows of which sequences make the next step, and who gets pages."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from edge_runtime.devices.base import SequenceSlice, Step
from edge_runtime.errors import OutOfMemoryError
from edge_runtime.offload.kv_cache import KVCache
from edge_runtime.offload.pages import PAGE_TOKENS, pages_for
from edge_runtime.sequence import Priority, Sequence, State, Wants

BATCH_SHARE = 4  # one batch request is admitted after this many interactive ones
SCORE_ROWS = 128  # of a step, whose logits are all kept at once: 66 MB where the vocabulary has 128k tokens
PATIENCE = 8  # steps that a running prompt may go without rows before it comes first


@dataclass(frozen=True)
class Part:
    """`count` tokens of a sequence from its first pending one on; logits: whether a token is sampled after it."""

    sequence: Sequence
    count: int
    logits: bool

    def slice(self) -> SequenceSlice:
        seq, start = self.sequence, self.sequence.table.length
        return SequenceSlice(
            seq.tokens[start:start + self.count], start, seq.table.addresses,
            logits="all" if seq.wants is Wants.SCORE else "last" if self.logits else "none",
            hidden=seq.wants is Wants.HIDDEN, prompt=start < seq.prompt_length,
            exit=seq.exit.rule() if seq.exit is not None and self.decodes else None,
            key=seq.key, interactive=seq.priority is Priority.INTERACTIVE)

    @property
    def decodes(self) -> bool:
        return self.count == 1 and self.sequence.decoding

    @property
    def rows(self) -> int:
        """Rows of the step at most: states that wait from earlier tokens may go along."""
        return self.count + (self.sequence.exit.pending if self.sequence.exit is not None else 0)


@dataclass(frozen=True)
class DraftPart:
    """A sequence whose next token is computed together with up to `most` drafts of the ones after it."""

    sequence: Sequence
    most: int


@dataclass(frozen=True)
class Schedule:
    parts: tuple[Part, ...] = ()
    failed: tuple[tuple[Sequence, OutOfMemoryError], ...] = ()  # can never get the pages they need
    drafts: tuple[DraftPart, ...] = ()

    @property
    def step(self) -> Step:
        return Step(tuple(part.slice() for part in self.parts))

    def only(self, parts: Iterable[int]) -> Schedule:
        """The same with some of the parts, by their indices."""
        return replace(self, parts=tuple(self.parts[i] for i in parts))

    @property
    def prompt_rows(self) -> int:
        """Rows of prompt chunks, decoded tokens not counted."""
        return sum(part.count for part in self.parts if part.count > 1)


@dataclass
class Batcher:
    """Decode rows first, then prompt chunks within `max_rows`, then new sequences up to `max_batch`.

    Chunks end at page boundaries, so that a prompt is cut the same way whatever runs beside it. While an interactive
    sequence decodes, prompts get at most `mixed_rows` a step, which bounds the time between its tokens; else
    `prompt_rows`, which bounds the time until a cancellation is seen. When pages run out, or an interactive sequence
    finds the batch full of others, the youngest sequence of the lowest priority gives its place and pages back and is
    computed again later. A sequence whose next page another one is just computing waits for it.

    uniform: the device computes decoded rows just as a prompt's, so full pages of generated tokens are shared too.
    leaving: told of each running sequence that stops, before its pages go.
    """

    cache: KVCache
    max_rows: int
    max_batch: int
    uniform: bool = False
    leaving: Callable[[Sequence], None] = lambda seq: None
    mixed_rows: int = 128
    prompt_rows: int = 1 << 20
    running: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    _waiting: tuple[OrderedDict[int, Sequence], OrderedDict[int, Sequence]] = field(
        default_factory=lambda: (OrderedDict(), OrderedDict()))
    _computing: dict[bytes, Sequence] = field(default_factory=dict)  # pages that running prompts will fill
    _arrivals: int = 0
    _since_batch: int = 0

    def __post_init__(self) -> None:
        self.max_batch = min(self.max_batch, self.max_rows)

    @property
    def idle(self) -> bool:
        return not self.running and not any(self._waiting)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting))

    def sequences(self) -> list[Sequence]:
        return [*self.running, *(seq for queue in self._waiting for seq in queue.values())]

    def add(self, seq: Sequence) -> None:
        self._arrivals += 1
        seq.order = self._arrivals
        seq.state = State.WAITING
        self._waiting[seq.priority][id(seq)] = seq

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, in whatever state; its table stays as it is, for the caller to release or keep."""
        self._leave(seq)
        self._waiting[seq.priority].pop(id(seq), None)
        seq.state = State.FINISHED

    def schedule(self) -> Schedule:
        """The next step: empty when nothing can run."""
        parts: list[Part] = []
        drafts: list[DraftPart] = []
        failed: list[tuple[Sequence, OutOfMemoryError]] = []
        self.running.sort(key=lambda seq: seq.rank)
        for seq in [seq for seq in self.running if seq.decoding]:
            if seq.state is State.RUNNING:  # not preempted for one before it
                error = self._make_room(seq)
                if error is not None:
                    failed.append((seq, error))
                elif seq.state is State.RUNNING and seq.drafts:
                    drafts.append(DraftPart(seq, self._room_for_drafts(seq)))
                elif seq.state is State.RUNNING:
                    parts.append(Part(seq, 1, logits=True))
        drafts = [draft for draft in drafts if draft.sequence.state is State.RUNNING]
        rows = self._prompt_rows(parts)
        prompts = [seq for seq in self.running if not seq.decoding]
        for seq in sorted(prompts, key=lambda seq: (seq.skipped < PATIENCE, seq.rank)):
            rows -= self._add_chunk(parts, seq, rows)
        rows, error_of = self._admit(parts, rows)
        failed += error_of
        return Schedule(tuple(parts), tuple(failed), tuple(d for d in drafts if d.sequence.state is State.RUNNING))

    def commit(self, schedule: Schedule) -> None:
        """The device has run `schedule`: its tokens have KV now, and full pages can be shared."""
        for part in schedule.parts:
            seq = part.sequence
            seq.table.advance(part.count, shareable=self.uniform or seq.table.length < seq.prompt_length)
            full = seq.table.shareable // PAGE_TOKENS
            if full > seq.pages_indexed:
                keys = seq.page_keys()
                for page in range(seq.pages_indexed, full):
                    self.cache.index.insert(keys[page], seq.parent_key(page), seq.table.pages[page])
                    if self._computing.get(keys[page]) is seq:
                        del self._computing[keys[page]]
                seq.pages_indexed = full

    def _prompt_rows(self, parts: list[Part]) -> int:
        interactive = any(seq.decoding and seq.priority is Priority.INTERACTIVE for seq in self.running)
        taken = sum(part.rows for part in parts)
        return min(self.max_rows - taken, self.mixed_rows if interactive else self.prompt_rows)

    def _add_chunk(self, parts: list[Part], seq: Sequence, rows: int) -> int:
        """Give a prompt its next chunk from `rows`; returns the rows taken. Generated tokens that are computed again
        come in chunks of their own: a device may compute them otherwise than a prompt's."""
        count = seq.pending
        if seq.table.length < seq.prompt_length:
            count = min(count, seq.prompt_length - seq.table.length)
        if seq.wants is Wants.SCORE:
            rows = min(rows, SCORE_ROWS - sum(part.count for part in parts if part.sequence.wants is Wants.SCORE))
        if count > rows:  # cut at a page boundary, or not at all while the budget is below a page
            start = seq.table.length
            cut = (start + rows) // PAGE_TOKENS * PAGE_TOKENS - start
            small_steps = self.max_rows < PAGE_TOKENS + self.max_batch
            count = cut if cut > 0 else rows if small_steps else 0
        if count <= 0:
            seq.skipped += 1
            return 0
        seq.skipped = 0
        parts.append(Part(seq, count, logits=count == seq.pending and seq.wants is Wants.TOKEN))
        return count

    def _admit(self, parts: list[Part], rows: int) -> tuple[int, list[tuple[Sequence, OutOfMemoryError]]]:
        failed: list[tuple[Sequence, OutOfMemoryError]] = []
        full = len(self.running) >= self.max_batch
        if rows <= 0 or not any(self._waiting) or (full and not self._waiting[Priority.INTERACTIVE]):
            return rows, failed
        for seq in self._waiting_order():
            if rows <= 0:
                break
            if seq.blocked_on in self._computing:
                continue
            keys = seq.reusable_keys()
            hit = self.cache.index.match(keys)
            if hit < len(keys) and keys[hit] in self._computing:
                seq.blocked_on = keys[hit]
                continue
            if not self._make_place(seq, pages_for(seq.length) - max(hit, len(seq.table.pages)), parts):
                break
            error = self._start(seq, keys[:hit])
            if error is not None:
                if self.running:
                    break
                self.remove(seq)
                failed.append((seq, error))
                continue
            rows -= self._add_chunk(parts, seq, rows)
        return rows, failed

    def _make_place(self, seq: Sequence, pages: int, parts: list[Part]) -> bool:
        """Whether a newcomer finds a place in the batch and its pages; an urgent one takes those of batch requests.

        One page per running sequence stays free, or the newcomer would soon push one of them out.
        """
        while self.running:
            if len(self.running) < self.max_batch and self.cache.can_get(pages + len(self.running)):
                return True
            victim = max(self.running, key=lambda other: other.rank)
            if not seq.rank[0] < victim.rank[0]:
                return False
            self._preempt(victim)
            parts[:] = [part for part in parts if part.sequence is not victim]
        return True

    def _start(self, seq: Sequence, keys: list[bytes]) -> OutOfMemoryError | None:
        """Move a waiting sequence to the running ones, with a cached prefix and pages for all its tokens."""
        self.cache.unpark(seq.table)
        if len(keys) * PAGE_TOKENS > seq.table.length:
            seq.table.release()
            seq.table.adopt(self.cache.index.acquire(keys))
        try:
            seq.table.reserve(seq.pending)
        except OutOfMemoryError as error:
            seq.table.release()
            return error
        if seq.preemptions == 0:
            seq.cached_tokens = seq.table.length
        seq.pages_indexed = seq.table.shareable // PAGE_TOKENS
        if seq.table.shareable == seq.table.length:
            sure = (seq.length if self.uniform else seq.prompt_length) // PAGE_TOKENS
            for key in seq.page_keys()[seq.pages_indexed:sure]:
                self._computing.setdefault(key, seq)
        self._waiting[seq.priority].pop(id(seq))
        self._since_batch = 0 if seq.priority is Priority.BATCH else self._since_batch + 1
        seq.state, seq.blocked_on, seq.skipped = State.RUNNING, None, 0
        self.running.append(seq)
        return None

    def _make_room(self, seq: Sequence) -> OutOfMemoryError | None:
        """A page for the next token, if need be another sequence's; the error when `seq` runs alone and there is
        none."""
        while True:
            try:
                seq.table.reserve(1)
                return None
            except OutOfMemoryError as error:
                if len(self.running) == 1:
                    self.remove(seq)
                    return error
                victim = max(self.running, key=lambda other: other.rank)
                self._preempt(victim)
                if victim is seq:
                    return None

    def _room_for_drafts(self, seq: Sequence) -> int:
        """Drafts that find pages without taking anybody's, each running sequence's next page included."""
        assert seq.exit is not None
        most = seq.exit.plan.early.max_draft
        while most > 0:
            short = seq.table.pages_short(1 + most)
            if not short or self.cache.can_get(short + len(self.running)):
                seq.table.reserve(1 + most)
                break
            most -= 1
        return most

    def _preempt(self, seq: Sequence) -> None:
        self._leave(seq)
        if seq.exit is not None:
            seq.exit.forget()
        seq.table.release()
        seq.preemptions += 1
        self.preemptions += 1
        seq.state = State.WAITING
        queue = self._waiting[seq.priority]
        queue[id(seq)] = seq
        queue.move_to_end(id(seq), last=False)

    def _leave(self, seq: Sequence) -> None:
        if seq.state is State.RUNNING:
            self.running.remove(seq)
            self.leaving(seq)
            for key in seq.page_keys():
                if self._computing.get(key) is seq:
                    del self._computing[key]

    def _waiting_order(self) -> Iterator[Sequence]:
        interactive, batch = ([*reversed(queue.values())] for queue in self._waiting)
        while interactive or batch:
            turn = batch if batch and (not interactive or self._since_batch >= BATCH_SHARE) else interactive
            yield turn.pop()
