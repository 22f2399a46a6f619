"""Summaries of many documents, or answers to a batch file: what the command line and other people's Python call."""
from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edge_runtime.apps.documents import Document, real_path
from edge_runtime.apps.summarizer.backend import Backend, LocalBackend
from edge_runtime.apps.summarizer.batch_requests import Requests
from edge_runtime.apps.summarizer.ledger import Entry, Ledger
from edge_runtime.apps.summarizer.outputs import (
    FORMATS,
    Facts,
    LinesOutput,
    MarkdownOutput,
    NoOutput,
    Output,
    renderer,
)
from edge_runtime.apps.summarizer.pipeline import Pipeline
from edge_runtime.apps.summarizer.prompts import Prompts, Shape
from edge_runtime.apps.summarizer.report import Totals
from edge_runtime.apps.summarizer.sources import Item, Source, digest, source_of
from edge_runtime.apps.summarizer.strategies import Documents, Job, Options
from edge_runtime.errors import InvalidRequestError
from edge_runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from edge_runtime.llm import LLM

LEDGER_SUFFIX, FOLDER_LEDGER = ".ledger", ".ledger"


@dataclass(frozen=True)
class Summary:
    """One document's result. text: None where `error` says why. chunks: pieces it was cut into; parts: their summaries
    where there are several; complete: no reply was ended by max_tokens. Tokens are those of all requests made for
    it."""

    path: str
    text: str | None
    strategy: str | None = None
    chunks: int = 0
    parts: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    complete: bool = True
    error: str | None = None

    @classmethod
    def of(cls, entry: Entry) -> Summary:
        found = entry.result or {}
        return cls(entry.name, found.get("text"), found.get("strategy"), found.get("chunks", 0),
                   tuple(found.get("parts", ())), found.get("prompt_tokens", 0), found.get("completion_tokens", 0),
                   found.get("complete", False), None if entry.error is None else entry.error["message"])


@dataclass(frozen=True)
class Target:
    """Where the output goes. path: a file, for "markdown" a folder; None: nowhere, or `stdout`. The ledger lies beside
    the file, or in the folder."""

    path: Path | None = None
    form: str = "jsonl"
    stdout: BinaryIO | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMATS:
            raise InvalidRequestError("format", self.form, f"one of {', '.join(FORMATS)}")
        if self.form == "markdown" and (self.path is None or self.path.is_file()):
            raise InvalidRequestError("out", str(self.path), "a folder, for --format markdown")
        if self.form != "markdown" and self.path is not None and self.path.is_dir():
            raise InvalidRequestError("out", str(self.path), "a file, not a folder (which --format markdown takes)")

    @property
    def ledger(self) -> Path | None:
        if self.path is None:
            return None
        return self.path / FOLDER_LEDGER if self.form == "markdown" else self.path.with_name(
            self.path.name + LEDGER_SUFFIX)

    def open_ledger(self, manifest: dict[str, Any], fresh: bool) -> Ledger:
        """Raises JobError; InvalidRequestError for output that is there without a ledger, and so not ours."""
        ledger = Ledger(self.ledger, manifest, fresh=fresh)
        if not fresh and not ledger.resumed and self.path is not None and self._foreign(self.path):
            ledger.discard()
            raise InvalidRequestError("out", str(self.path), "new: what is there has no ledger to go on from; --fresh "
                                                             "writes over it")
        return ledger

    def refuse_inputs(self, paths: Iterable[Path]) -> None:
        """Raises InvalidRequestError where what is named as input would be written over."""
        if self.path is None:
            return
        for path in paths:
            real = real_path(path)
            if real_path(self.path) in (real, *real.parents):
                raise InvalidRequestError("out", str(self.path), f"a path of its own: the input {path} lies there, and "
                                                                 f"--fresh would write over it")

    def _foreign(self, path: Path) -> bool:
        if self.form == "markdown":
            return next(path.rglob("*.md"), None) is not None
        return path.exists() and path.stat().st_size > 0

    @property
    def files(self) -> list[Path]:
        """What is no input, where it lies in an input's folder."""
        return [path for path in (self.path, self.ledger) if path is not None]


class Summarizer:
    """Asks a model for summaries, and answers batch files.

    model: an `LLM`, or another `Backend`. prompt: holds `{document}`; None: the model's own. params: of each reply.
    length, style: see `Shape.of`. strategy, compress, chunk_tokens: see `Options`. requests: only batch files will
    come, whose lines say all that by themselves. Raises InvalidRequestError.
    """

    def __init__(self, model: LLM | Backend, *, prompt: str | None = None, params: SamplingParams | None = None,
                 length: str | int | None = None, style: str | None = None, strategy: str = "auto",
                 compress: float = 1.0, chunk_tokens: int | None = None, requests: bool = False):
        self.backend: Backend = model if hasattr(model, "slots") else LocalBackend(model)  # type: ignore[assignment]
        shape = Shape.of(length, style)
        if params is None:
            params = SamplingParams(temperature=0.0, top_p=1.0, max_tokens=max(256, 2 * (shape.words or 0)))
        self.prompts = Prompts.build(bundled=self.backend.bundled, prompt=prompt, shape=shape)
        if strategy == "extractive":
            self.prompts = Prompts(self.prompts.map, self.prompts.reduce, self.prompts.refine, shape)
        self.params = params
        self.options = Options(strategy, compress, chunk_tokens)
        self.documents = None if requests else Documents(self.backend, self.prompts, params, self.options)
        self.totals = Totals()

    @property
    def chunk_tokens(self) -> int:
        assert self.documents is not None
        return self.documents.chunk_tokens

    def manifest(self, target: Target, batch: bool) -> dict[str, Any]:
        """What the output depends on, beside the input."""
        found: dict[str, Any] = {"model": self.backend.identity, "format": target.form, "batch": batch}
        if not batch:
            found |= {"prompts": asdict(self.prompts), "options": asdict(self.options), "params": _told(self.params)}
        return found

    def run(self, source: Source | Iterable[str | Path], target: Target | None = None, *,
            fresh: bool = False) -> Generator[Entry, None, None]:
        """The ledger's entries in the order of the input, each as soon as it is sure to be in the output. `Summary.of`
        reads one. Where the target's ledger was begun before, it goes on there; `fresh` forgets it.

        Raises JobError (LedgerBusyError, ManifestError, StorageError, ...) for the whole; a document that fails becomes
        an entry with an error.
        """
        target = target or Target()
        found: Source = source if hasattr(source, "batch") else source_of(  # type: ignore[assignment]
            [Path(path) for path in source], target.files)
        target.refuse_inputs(getattr(found, "paths", ()))
        self.totals = Totals()
        ledger = target.open_ledger(self.manifest(target, found.batch), fresh)
        try:
            pipeline = self._pipeline(found, target, ledger)
            yield from pipeline.run()
        finally:
            ledger.close()

    def summarize(self, document: Document) -> Summary:
        """One document. Raises InvalidRequestError for its failure."""
        item = Item(str(document.path), digest(document.text.encode("utf-8", "surrogatepass")), document.text)
        [entry] = self.run(_One(item))
        summary = Summary.of(entry)
        if summary.error is not None:
            raise InvalidRequestError("document", summary.path, f"one that can be summarized: {summary.error}")
        return summary

    def job(self, item: Item) -> Job:
        """A document's, as `Pipeline` runs them."""
        if self.documents is None:
            raise InvalidRequestError("source", item.name, "a batch file: this summarizer was made for requests")
        return self.documents.job(item.text or "")

    def maker(self, source: Source) -> Any:
        """Item -> Job, for the source's kind."""
        if not source.batch:
            return self.job
        return Requests(self.backend, source.created, remote=hasattr(self.backend, "servers")).job

    def _pipeline(self, source: Source, target: Target, ledger: Ledger) -> Pipeline:
        if self.documents is not None and not source.batch:
            kept = ledger.get("chunk_tokens")
            if kept is not None and kept != self.documents.chunk_tokens:
                # "auto" contexts follow the free memory: chunks stay as they were, or their answers would not fit.
                options = Options(self.options.strategy, self.options.compress, kept)
                self.documents = Documents(self.backend, self.prompts, self.params, options)
            ledger.set("chunk_tokens", self.documents.chunk_tokens)
            ledger.commit()
        return Pipeline(self.backend, source, self.maker(source), ledger,
                        output_of(source, target, ledger, self.backend.model), self.totals)


def output_of(source: Source, target: Target, ledger: Ledger, model: str) -> Output:
    """A target's output."""
    facts = Facts(source.batch, source.created, model)
    if target.form == "markdown":
        assert target.path is not None
        return MarkdownOutput(target.path, facts, lambda name, document: ledger.place_of_target(name) not in (
            None, document))
    if target.path is None and target.stdout is None:
        return NoOutput()
    return LinesOutput(target.path, renderer(target.form, facts), target.stdout)


class _One:
    batch, created = False, 0

    def __init__(self, item: Item):
        self.item = item

    def __iter__(self) -> Any:
        return iter((self.item,))

    def count(self) -> int:
        return 1


def _told(params: SamplingParams) -> dict[str, Any]:
    return {name: value if isinstance(value, bool | int | float | str | None) else repr(value)
            for name, value in vars(params).items()}
