"""The task that runs on a worker: one attempt at a shard, its progress reports and its failure."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from dask.distributed import Worker, get_worker

from dtcache.errors import DiskError, DtcacheError, one_line
from dtcache.store.pending_shard import WrittenShard

Task = Callable[[str, int, Callable[[int], None]], WrittenShard]
"""Computes a shard and reports finished rows; a function that workers can import."""

REPORT_SECONDS = 1.0
"""Least seconds between two reports of a worker."""

logger = logging.getLogger("distributed.dtcache")
"""A child of Dask's logger, so that its messages go to the same log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """An attempt at a shard that raised an exception on its worker."""

    worker: str
    """Address of the worker."""
    reason: str
    final: bool
    """Whether the attempt would fail on every other worker too."""


def run_task(task: Task, assignment: str, shard: int, topic: str) -> WrittenShard | Failed:
    """Run a task on this worker.

    A failure is returned as text, because not every exception can be pickled.
    """
    worker = get_worker()
    report = _Report(worker, topic, shard)
    try:
        return task(assignment, shard, report)
    except DtcacheError as error:
        # A disk may fail on one machine only; other errors of dtcache occur on every machine.
        return Failed(
            worker=worker.address, reason=str(error), final=not isinstance(error, DiskError)
        )
    except Exception as error:
        logger.exception("shard %d", shard)
        reason = f"{type(error).__name__}: {one_line(error)}"
        return Failed(worker=worker.address, reason=reason, final=False)


class _Report:
    """Sends the coordinator the number of finished rows of an attempt, at most once per second."""

    def __init__(self, worker: Worker, topic: str, shard: int) -> None:
        self._worker = worker
        self._topic = topic
        self._shard = shard
        self._rows = 0
        self._sent = time.monotonic()

    def __call__(self, rows: int) -> None:
        """Count finished rows."""
        self._rows += rows
        if time.monotonic() - self._sent > REPORT_SECONDS:
            self._sent = time.monotonic()
            self._worker.log_event(self._topic, (self._shard, self._rows))
