"""Results leave in the order of the input, each once, whatever order they come in and however often a run is killed."""
from __future__ import annotations

from collections.abc import Iterator

from edge_runtime.apps.summarizer.errors import JobError
from edge_runtime.apps.summarizer.ledger import Entry, Ledger, ledger_text
from edge_runtime.apps.summarizer.outputs import Output
from edge_runtime.apps.summarizer.report import Totals
from edge_runtime.apps.summarizer.sources import Item
from edge_runtime.errors import EdgeRuntimeError


class InOrder:
    """Between ledger and output. `admit` every item in order, `finish` them in any, `drain` after each round."""

    def __init__(self, ledger: Ledger, output: Output, totals: Totals, *, unique_names: bool):
        self.ledger, self.output, self.totals, self.unique_names = ledger, output, totals, unique_names
        self._next = 0  # the document to be written next
        self._finished: set[int] = set()  # documents that are done and not written
        self._kept: list[Entry] = []

    def open(self) -> None:
        """Go on behind what is sure to be in the output. Raises StorageError."""
        self._next, end = self.ledger.written
        if not self.output.open(end):
            self._rewind(0)

    def admit(self, document: int, item: Item) -> bool:
        """Whether an item's job is to run now: not where the ledger has its result, nor where it is bad in itself."""
        entry = self.ledger.entry(document)
        if entry is not None and (entry.name != ledger_text(item.name) or entry.hash != item.hash):
            self._rewind(document)
            self.ledger.forget(document)
            entry = None
        if entry is not None and entry.status == "done":
            self.totals.kept += 1
            if document < self._next:
                self._kept.append(entry)
            else:
                self._finished.add(document)
            return False
        if document < self._next:  # it had failed, and its error was written
            self._rewind(document)
        self.ledger.begin(document, item.name, item.hash)
        error = item.error
        if error is None and self.unique_names:
            first = self.ledger.place_of(item.name)
            if first is not None and first < document:
                error = {"code": "duplicate_custom_id", "param": "custom_id", "line": item.line,
                         "message": f"line {item.line}: custom_id {item.name!r} is an earlier line's"}
        if error is not None:
            self.finish(document, item.name, None, error, 0.0)
        return error is None

    def finish(self, document: int, name: str, result: dict | None, error: dict | None, seconds: float) -> None:
        self.ledger.finish(document, result, error, seconds)
        self._finished.add(document)
        self.totals.ended_document(name, seconds, error is not None)

    def drain(self) -> Iterator[Entry]:
        """What comes next in order goes out, then the ledger counts it, then it is yielded."""
        entries = []
        while self._next in self._finished:
            entry = self.ledger.entry(self._next)
            assert entry is not None
            end, target = self.output.write(entry)
            self.ledger.write(self._next, end, target)
            self._finished.remove(self._next)
            self._next += 1
            entries.append(entry)
        if entries:
            self.output.flush()
        self.ledger.commit()
        kept, self._kept = self._kept, []
        yield from kept
        yield from entries

    def end(self, count: int) -> None:
        """The input has `count` items: what it had more once is forgotten."""
        if self.ledger.entry(count) is not None:
            self._rewind(count)
            self.ledger.forget(count)

    def _rewind(self, document: int) -> None:
        """Write again from this document on."""
        end = self.ledger.unwrite(document)
        self._next = min(self._next, document)
        if not self.output.open(end):
            raise JobError("the output is not what its ledger says, and cannot be written again. Start over with "
                           "--fresh.")
        self.ledger.commit()


def failure(error: BaseException, item: Item, hopeless: bool) -> dict:
    """An error as the ledger keeps it."""
    if isinstance(error, EdgeRuntimeError):
        code, text = "invalid_request" if hopeless else "failed", str(error)
    else:
        code, text = "internal", f"internal error: {type(error).__name__}: {error}"
    text = " ".join(text.split())
    if item.line is None:
        return {"code": code, "message": text}
    return {"code": code, "line": item.line, "message": f"line {item.line}: {text}"}
