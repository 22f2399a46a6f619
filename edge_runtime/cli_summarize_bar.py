"""The progress bar of `edge-runtime summarize`."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.apps.summarizer import Summarizer


@contextlib.contextmanager
def bar(summarizer: Summarizer, total: int, noun: str) -> Iterator[Callable[[str | None], None]]:
    """A bar on stderr with documents, tokens/s (read + written) and the time left, and a function that prints above
    it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            totals = summarizer.totals
            return Text(f"{totals.prompt_rate:.0f} + {totals.completion_rate:.0f} tokens/s", no_wrap=True)

    class Left(ProgressColumn):
        """From the documents of this run: those that an earlier one had done took no time."""

        def render(self, task: Any) -> Text:
            totals = summarizer.totals
            left = (task.total - totals.done) * totals.seconds / totals.documents if totals.documents else None
            if left is None or left < 0:
                return Text("ETA -:--:--", no_wrap=True)
            minutes, seconds = divmod(round(left), 60)
            return Text(f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}", no_wrap=True)

    console = Console(stderr=True, highlight=False)
    with Progress(TextColumn("summarizing"), BarColumn(12), MofNCompleteColumn(), TextColumn(noun), Speed(),
                  TimeElapsedColumn(), Left(), console=console, redirect_stdout=False) as shown:
        task = shown.add_task("summarizing", total=total)

        def report(text: str | None) -> None:
            if text is not None:
                shown.console.print(text, markup=False, soft_wrap=True)
            shown.update(task, completed=summarizer.totals.done)

        yield report
