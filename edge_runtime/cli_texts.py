"""What the commands about early exit share: texts, the sequences made of them, progress."""
from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.exit_trace import Decoded
    from edge_runtime.llm import LLM

Bars = Callable[[str], Callable[[int, int], Any]]  # a bar's title -> what tells it (done, of)


def sequences(llm: LLM, texts: list[str] | None, documents: int, show: Bars, *, prompt: str | None, raw: bool,
              as_written: bool, max_tokens: int, passage_tokens: int | None, seed: int | None = None,
              check: Callable[[Sequence[Any]], object] | None = None) -> list[Decoded]:
    """What to replay: replies to the texts, or to held-out documents of the bundled model's kind; or the texts. seed:
    of these documents; None: the one for calibration. check: is shown the passages before the model replies to them,
    which may take hours, and raises where they cannot do."""
    from edge_runtime import calibration_corpus, calibration_text

    if max_tokens < 2:
        raise InvalidRequestError("max_tokens", max_tokens, "a whole number from 2 up: the first comes with the prompt")
    if texts is None:
        if documents < 1:
            raise InvalidRequestError("documents", documents, "a whole number from 1 up")
        asked = list(enumerate(calibration_corpus.prompts(
            documents, calibration_corpus.SEED if seed is None else seed)))
        if check is not None:
            check(asked)
        return calibration_text.replies(llm, asked, max_tokens=max_tokens, advance=show("replying"))
    shown = (calibration_text.PLACE if prompt is None else prompt).replace("\\n", "\n")
    around = 0 if as_written else max_tokens + len(llm.tokenize(shown)) + 32  # a chat template's own tokens
    room = max(2 * calibration_text.TEXT_LEAD, llm.context - around)
    parts = calibration_text.passages(llm, texts, min(512, room) if passage_tokens is None else passage_tokens)
    if check is not None:
        check(parts)
    if as_written:
        return calibration_text.as_written(llm, parts)
    return calibration_text.replies(llm, parts, prompt=shown, raw=raw or llm.chat_template is None,
                                    max_tokens=max_tokens, advance=show("replying"))


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Texts of files and folders, in order. Raises DocumentError for the first that cannot be read."""
    from edge_runtime.apps.documents import DocumentError, find_files, read_document

    texts = []
    for path in find_files(paths):
        if isinstance(path, DocumentError):
            raise path
        text = read_document(path).text
        texts += _lines(path, text) if path.suffix.lower() == ".jsonl" else [text]
    return texts


def _lines(path: Path, text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut inside strings too, at U+2028 say
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise InvalidRequestError(f"{path}:{number}", line, 'a JSON object with a string under "text"')
        found.append(value["text"])
    return found


def several(text: str, known: Sequence[str]) -> list[str]:
    """Names with commas between, or all."""
    return list(known) if text == "all" else list(dict.fromkeys(part.strip() for part in text.split(",")))


@contextlib.contextmanager
def bars() -> Iterator[Bars]:
    """Bars on stderr, one below the other."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=Console(stderr=True), redirect_stdout=False) as progress:
        def bar(title: str) -> Callable[[int, int], Any]:
            task = progress.add_task(title, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield bar
