"""A run's metrics: the lines of `metrics.jsonl`, which a tracker receives too."""

import itertools
import json
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from dtcache.atomic_files import disk_errors, write_file
from dtcache.errors import CacheDamagedError
from dtcache.recipe import Json
from pipelines.runs.folder import METRICS
from pipelines.runs.trackers import Tracker

MAX_BYTES = 256 << 20
"""Most bytes of metrics that are read."""
LARGEST = 1e300
"""Bound of the numbers in metrics, which JSON does not bound."""


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
        kept = [line for line in _lines_of(self._path) if line and line["step"] <= step]
        write_file(self._path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())

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
    """Return the lines of a run's metrics up to one that was not written to its end.

    Each has a `step`, an integer of 0 or more, and finite numbers. Raises CacheDamagedError if the
    file is too large.
    """
    return [line for line in itertools.takewhile(bool, _lines_of(out / METRICS)) if line]


def _lines_of(path: Path) -> list[Json | None]:
    """Return every line of a file; None for a line that is not one of metrics."""
    if not path.is_file():
        return []
    if path.stat().st_size > MAX_BYTES:
        raise CacheDamagedError(
            f"{path}: expected at most {MAX_BYTES} bytes, got {path.stat().st_size}"
        )
    return [_parsed(line) for line in path.read_bytes().splitlines()]


def _parsed(line: bytes) -> Json | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    are_numbers = all(type(v) in (int, float) and abs(v) < LARGEST for v in values.values())
    return values if are_numbers and values["step"] >= 0 else None
