"""The coordinator: submits one task per shard, collects results, and retries failures elsewhere."""

import contextlib
import queue
import secrets
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dask.distributed import Client, Future, KilledWorker

from dtcache._version import __version__
from dtcache.errors import ClusterError, one_line
from dtcache.store.pending_shard import WrittenShard
from pipelines.extract.workers.task import Failed, Task, logger, run_task
from pipelines.terminal.output import say

TASKS_PER_WORKER = 2
"""Tasks in flight: the running and the next one, so that no worker waits for the coordinator."""
MOST_ATTEMPTS = 3
"""Failed attempts at a shard that end the run; each is on another worker if there is one."""
COUNT_SECONDS = 1.0
"""Seconds between counts of the workers."""
COLLECT_SECONDS = 5.0
"""Longest wait for one event or result, before the coordinator handles others."""
WAIT_SECONDS = 20.0
"""Seconds between messages that no worker is connected."""
ANSWER_SECONDS = 60.0
"""A scheduler that takes longer than this to answer counts as lost."""
STALL_SECONDS = 20.0
"""If no event comes for this long and all workers are idle, the tasks are resubmitted."""
Attempt: TypeAlias = "Future[WrittenShard | Failed]"
"""A string, because the Future of some versions of Dask takes no type parameter."""
RESUME = "what is committed stays: run the same command again to resume"


@dataclass(kw_only=True, slots=True)
class _Shard:
    """A shard that is not committed yet."""

    rows: int
    reported: int = 0
    """Rows that were reported as finished: the most that any attempt has finished."""
    future: "Attempt | None" = None
    tries: int = 0
    """Submissions so far; each has its own key."""
    failed: list[Failed] = field(default_factory=list)


class ClusterRun:
    """One run: its tasks in flight, its failures by worker, and the rows that were reported."""

    def __init__(
        self,
        client: Client,
        task: Task,
        assignment: str,
        rows: Mapping[int, int],
        on_rows: Callable[[int], None],
    ) -> None:
        """`rows` is the number of rows by shard; `on_rows` is called with numbers of finished
        rows."""
        self._client = client
        self._task = task
        self._assignment = assignment
        self._on_rows = on_rows
        self._name = f"dtcache-{secrets.token_hex(6)}"
        self._shards = {shard: _Shard(rows=count) for shard, count in rows.items()}
        self._waiting = list(reversed(self._shards))
        self._flying: set[int] = set()
        self._count = 0
        self._counted = 0.0
        self._alone = self._heard = time.monotonic()
        # Dask calls back in its own threads, which only put events into this queue.
        self._events: queue.SimpleQueue[tuple[int, int | Attempt]] = queue.SimpleQueue()

    def results(self) -> Generator[WrittenShard, None, None]:
        """Yield every written shard, in any order; the caller commits them.

        Raises ClusterError if a shard cannot be computed or the scheduler is lost.
        """
        self._client.subscribe_topic(self._name, lambda event: self._events.put(event[1]))
        try:
            while self._waiting or self._flying:
                self._submit()
                shard, event = self._next()
                if isinstance(event, int):
                    self._heard = time.monotonic()
                    self._report(shard, event)
                elif (
                    isinstance(event, Future)
                    and (written := self._outcome(shard, event)) is not None
                ):
                    self._heard = time.monotonic()
                    self._report(shard, self._shards[shard].rows)
                    yield written
                    self._heard = time.monotonic()  # the caller may have taken long to commit it
                elif time.monotonic() - self._heard > STALL_SECONDS:
                    self._require_work()
        finally:
            self._stop()

    def _submit(self) -> None:
        """Submit shards until enough tasks are in flight."""
        while self._waiting and len(self._flying) < TASKS_PER_WORKER * max(1, self._workers()):
            shard = self._waiting.pop()
            state = self._shards[shard]
            failed = {failure.worker for failure in self._shards[shard].failed}
            others = (
                [worker for worker in self._addresses() if worker not in failed] if failed else None
            )
            self._connected()
            state.future = self._client.submit(
                run_task,
                self._task,
                self._assignment,
                shard,
                self._name,
                key=f"{self._name}-{shard:06}-{state.tries}",
                pure=False,
                workers=others or None,
                allow_other_workers=bool(others),
            )
            state.tries += 1
            self._flying.add(shard)
            state.future.add_done_callback(
                lambda future, shard=shard: self._events.put((shard, future))
            )

    def _require_work(self) -> None:
        """Resubmit the tasks in flight if there are workers and none of them computes anything.

        This was seen once, after a worker died with finished results: the scheduler announced that
        it would recompute them, and both workers stayed idle. The query goes to the workers
        themselves, because the scheduler may believe that they compute.
        """
        self._heard = time.monotonic()
        if not self._workers():
            return
        # If a worker disappears during the query, query again later.
        with contextlib.suppress(OSError, TimeoutError, RuntimeError):
            if (
                self._client.sync(self._connected().call_stack, callback_timeout=ANSWER_SECONDS)
                == {}
            ):
                self._resubmit()

    def _resubmit(self) -> None:
        """Put all shards in flight back into the queue."""
        logger.warning(
            "every worker is idle with %d shards in flight: resubmitting them", len(self._flying)
        )
        say(f"no worker computes any of {len(self._flying)} shards: resubmitting them")
        for shard in sorted(self._flying, reverse=True):
            state = self._shards[shard]
            future = state.future
            state.future = None
            if future is not None:
                future.release()
            self._waiting.append(shard)
        self._flying.clear()

    def _workers(self) -> int:
        """Return the number of workers, at most a second old. Raises ClusterError."""
        if time.monotonic() - self._counted > COUNT_SECONDS:
            self._count = len(self._addresses())
            self._counted = time.monotonic()
        return self._count

    def _addresses(self) -> list[str]:
        """Return the addresses of the workers. Raises ClusterError if the scheduler is lost."""
        scheduler = self._connected()
        try:
            # The client's own method never returns if the scheduler dies while it handles a query.
            return list(self._client.sync(scheduler.ncores, callback_timeout=ANSWER_SECONDS))
        except (OSError, TimeoutError, RuntimeError) as error:
            raise self._lost(one_line(error)) from error

    def _connected(self) -> Any:
        """Return the scheduler. Raises ClusterError if the connection is lost."""
        scheduler = self._client.scheduler
        if scheduler is None or self._client.status != "running":
            raise self._lost("the connection to it is lost")
        return scheduler

    def _next(self) -> "tuple[int, int | Attempt | None]":
        """Return the next shard and event: finished rows, a finished task, or None (timeout).

        Prints a message from time to time while no worker is connected.
        """
        if self._workers():
            self._alone = time.monotonic()
        elif time.monotonic() - self._alone > WAIT_SECONDS:
            self._alone = time.monotonic()
            say("no worker is connected to the scheduler: waiting for one")
        try:
            return self._events.get(timeout=COLLECT_SECONDS)
        except queue.Empty:
            return 0, None

    def _outcome(self, shard: int, future: Attempt) -> WrittenShard | None:
        """Return the written shard of a finished task, or None if its shard must be tried again."""
        if future is not self._shards[shard].future:
            return None  # an attempt that was abandoned
        try:
            outcome = future.result(timeout=COLLECT_SECONDS)
        except TimeoutError:  # the worker died with the result, and Dask recomputes it
            self._events.put((shard, future))
            return None
        except KilledWorker as error:
            address = error.last_worker.address
            outcome = Failed(
                worker=address,
                reason="its workers died while computing it: killed, or out of memory",
                final=False,
            )
        except Exception as error:
            if future.status in ("cancelled", "lost"):
                raise self._lost(one_line(error)) from error
            raise ClusterError(
                f"a worker cannot run the task ({one_line(error)}): install dtcache {__version__} "
                "and the other packages of the coordinator where the workers run"
            ) from error
        self._flying.remove(shard)
        self._shards[shard].future = None
        if isinstance(outcome, WrittenShard):
            return outcome
        self._failed(shard, outcome)
        return None

    def _failed(self, shard: int, failure: Failed) -> None:
        """Queue a shard again after a failed attempt. Raises ClusterError if no attempt is left."""
        failed = self._shards[shard].failed
        failed.append(failure)
        if failure.final:
            raise ClusterError(f"worker {failure.worker}: {failure.reason} ({RESUME})")
        logger.warning("shard %d failed on %s: %s", shard, failure.worker, failure.reason)
        if len(failed) >= MOST_ATTEMPTS:
            workers = ", ".join(dict.fromkeys(f.worker for f in failed))
            raise ClusterError(
                f"shard {shard} failed {len(failed)} times, on {workers}; the last time: "
                f"{failure.reason} ({RESUME})"
            )
        self._waiting.append(shard)

    def _report(self, shard: int, rows: int) -> None:
        """Report the rows of an attempt, without those that an earlier attempt has finished."""
        state = self._shards[shard]
        if rows > state.reported:
            self._on_rows(rows - state.reported)
            state.reported = rows

    def _stop(self) -> None:
        """Release pending futures; running tasks finish and their results are dropped."""
        with contextlib.suppress(Exception):  # the scheduler may be lost
            self._client.unsubscribe_topic(self._name)
            for state in self._shards.values():
                if state.future is not None:
                    state.future.release()

    def _lost(self, reason: str) -> ClusterError:
        return ClusterError(
            f"the Dask scheduler has gone away or has dropped the tasks ({reason}); {RESUME}"
        )
