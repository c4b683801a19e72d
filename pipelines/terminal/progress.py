"""Progress on stderr: a live bar with an ETA on a terminal, else a line from time to time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipelines.terminal.console import Terminal
from pipelines.terminal.listener import Progress as Event
from pipelines.terminal.listener import listener
from pipelines.terminal.output import say
from pipelines.terminal.text import printable

LINE_SECONDS = 20.0
SLOW = 0.1
"""Units per second below which the rate is shown per minute."""


class Tracker:
    """Counts the finished units of one task and shows their rate."""

    def __init__(
        self, title: str, total: int, done: int, bar: Progress | None, shown: bool
    ) -> None:
        self._title = printable(title)
        self._total = total
        self._done = done
        self._bar = bar
        self._shown = shown
        self._first = done
        self._start = time.monotonic()
        self._printed = time.monotonic()
        self._task = (
            bar.add_task(self._title, total=total, completed=done, note="") if bar else None
        )

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add finished units; `note` is shown beside the rate."""
        self._done += count
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._first) / seconds
        shown = f"{rate:.1f}/s" if rate >= SLOW or not rate else f"{60 * rate:.1f}/min"
        text = printable(f"{shown} {note}".strip())
        if (listen := listener()) is not None:
            listen(Event(title=self._title, done=self._done, total=self._total, note=text))
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, note=text)
        elif self._shown and time.monotonic() - self._printed > LINE_SECONDS:
            self._printed = time.monotonic()
            left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
            say(f"{self._title}: {self._done}/{self._total}, {text}{left}")


@contextmanager
def track(title: str, total: int, done: int = 0, *, shown: bool = True) -> Iterator[Tracker]:
    """Show progress of `total` units, `done` of them finished earlier; nothing if not `shown`."""
    console = Terminal(stderr=True, quiet=not shown)
    if listener() is not None or not console.is_terminal:
        yield Tracker(title, total, done, None, shown)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        yield Tracker(title, total, done, bar, shown)
