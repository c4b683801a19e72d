"""A run's metrics: its clock, its `metrics.jsonl`, its curves."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from dtcache.atomic_files import disk_errors, write_file
from dtcache.recipe import Json
from pipelines.runs.folder import METRICS
from pipelines.runs.trackers import Tracker

T = TypeVar("T")


class Clock:
    """Counts seconds, images and the time spent waiting for data, over all sessions of a run."""

    def __init__(self) -> None:
        self.load_state_dict({"seconds": 0.0, "waited": 0.0, "images": 0})

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"seconds": self.seconds, "waited": self._waited, "images": self._images}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint; what this session counted so far is dropped."""
        self._loaded = state
        self._start = time.monotonic()
        self._before = state["seconds"]
        self._waited = state["waited"]
        self._images = int(state["images"])

    def restart(self) -> None:
        """Drop what this session counted so far: the run has taken no step in it yet."""
        self.load_state_dict(self._loaded)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches, and count the time until each one arrives."""
        source = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(source, None)
            self._waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def count(self, images: int) -> None:
        """Add finished images."""
        self._images += images

    @property
    def seconds(self) -> float:
        """Seconds of work; an earlier session counts up to its last checkpoint."""
        return self._before + time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Images per second."""
        return self._images / max(self.seconds, 1e-9)

    @property
    def share(self) -> float:
        """Share of the time spent waiting for data, 0 to 1."""
        return self._waited / max(self.seconds, 1e-9)

    def line(self) -> Json:
        """Return the clock's fields of a metrics line, rounded."""
        return {
            "seconds": round(self.seconds, 2),
            "images_per_second": round(self.rate, 2),
            "wait_share": round(self.share, 4),
        }


class MetricsFile:
    """`metrics.jsonl`: JSON lines, each with a `step`. A tracker receives the same lines.

    The file is the record; a tracker only displays it. Use it as a context manager.
    """

    def __init__(self, out: Path, step: int, tracker: Tracker) -> None:
        """Continue after `step`: lines of later steps, which a resumed run repeats, are dropped.

        Raises DiskError.
        """
        self._path = out / METRICS
        self._tracker = tracker
        lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        write_file(self._path, "".join(f"{line}\n" for line in kept).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tracker.close(failed=error is not None)

    def write(self, line: Json) -> None:
        """Append one line. Raises DiskError."""
        with disk_errors(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._tracker.log(line)

    def flush(self) -> None:
        """Flush the tracker. Call it before a checkpoint that lies past these lines."""
        self._tracker.flush()


class NoMetrics(AbstractContextManager["NoMetrics"]):
    """Discards the lines, in processes that do not write the run folder."""

    def __exit__(self, *raised: object) -> None:
        pass

    def write(self, line: Json) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""


def read_metrics(out: Path) -> list[Json]:
    """Return all lines of a run's metrics."""
    return [json.loads(line) for line in (out / METRICS).read_text("utf-8").splitlines()]


def _step_of(line: str) -> float:
    """Return a line's step; infinity for a line that was not written to its end."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def plot_curves(
    curves: Mapping[str, Sequence[float]], path: Path, *, title: str, xlabel: str, smooth: int = 1
) -> None:
    """Write named curves as PNG, on a logarithmic axis; `smooth` is the width of a running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        width = max(1, min(smooth, len(values) // 4))
        y = np.convolve(np.asarray(values, float), np.ones(width) / width, mode="valid")
        axes.plot(np.arange(len(y)) + width, y, label=name)
    axes.set(title=title, xlabel=xlabel, yscale="log")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    figure.savefig(path, dpi=120)
