"""A run's metrics: the lines of `metrics.jsonl`, which a tracker receives too."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from dtcache.atomic_files import disk_errors, write_file
from dtcache.recipe import Json
from pipelines.runs.folder import METRICS
from pipelines.runs.trackers import Tracker


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
