"""A bar on the terminal, or somebody's own callback, for work that has a known number of parts."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], object]
PROFILING = "profile: "  # what is told while a model opens names kernels, and begins so while a profile is measured


@contextmanager
def progress_of(progress: bool | Progress, total: int, label: str = "generating") -> Iterator[Callable[[], None]]:
    """A function to call after each part. progress: False: nothing; True: a bar on stderr; a callable: gets (done,
    total)."""
    done = 0

    def count(show: Progress) -> Callable[[], None]:
        def advance() -> None:
            nonlocal done
            done += 1
            show(done, total)
        return advance

    if not progress:
        yield lambda: None
    elif callable(progress):
        yield count(progress)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            yield count(lambda done, _: bar.update(task, completed=done))
