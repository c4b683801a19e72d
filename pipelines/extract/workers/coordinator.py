"""The coordinator: one task a shard, a bounded number at a time, results as they come, failures tried elsewhere."""

import contextlib
import queue
import secrets
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dask.distributed import Client, Future, KilledWorker

from dtcache._version import __version__
from dtcache.errors import ClusterError, one_line
from dtcache.store.pending_shard import WrittenShard
from pipelines.extract.workers.task import Failed, Task, logger, run_task

TASKS_A_WORKER = 2
"""Tasks in flight: the one at work, and the next one, so that a worker never waits for the coordinator."""
MOST_ATTEMPTS = 3
"""Attempts at a shard, each elsewhere where there is another worker, before its failure is the run's."""
COUNT_SECONDS = 1.0
"""How often workers are counted."""
COLLECT_SECONDS = 5.0
"""How long the coordinator waits for one thing, such as a finished shard's description, before it looks at others."""
WAIT_SECONDS = 20.0
"""How often the coordinator says that there is no worker."""
ANSWER_SECONDS = 60.0
"""How long a scheduler may take to answer a question before it counts as gone."""
STALL_SECONDS = 20.0
"""Without a word for so long, and with every worker idle, Dask has lost what is in flight: it is submitted anew."""
Attempt: TypeAlias = "Future[WrittenShard | Failed]"
"""In quotes, for not every version of Dask has a Future that takes a type."""
RESUME = "what is committed stays: run the same command again to resume"


@dataclass(kw_only=True, slots=True)
class _Shard:
    """A shard that is not committed yet."""

    rows: int
    reported: int = 0
    """Rows that the bar has been told of: the most that any attempt has done."""
    future: "Attempt | None" = None
    tries: int = 0
    """Submissions so far; each has a key of its own."""
    failed: list[Failed] = field(default_factory=list)


class ClusterRun:
    """The coordinator's side of one run: what is in flight, what has failed and where, what the bar knows."""

    def __init__(
        self,
        client: Client,
        task: Task,
        assignment: str,
        rows: Mapping[int, int],
        on_rows: Callable[[int], None],
    ) -> None:
        """`rows` gives the number of rows of every shard that is wanted; `on_rows` hears of finished rows."""
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
        # Dask calls from threads of its own: they only leave word here.
        self._events: queue.SimpleQueue[tuple[int, int | Attempt]] = queue.SimpleQueue()

    def results(self) -> Generator[WrittenShard, None, None]:
        """Yield every shard's files as they come, in any order; the caller commits them.

        Raises ClusterError where a shard fails for good or the scheduler goes away.
        """
        self._client.subscribe_topic(self._name, lambda event: self._events.put(event[1]))
        try:
            while self._waiting or self._flying:
                self._submit()
                shard, word = self._next()
                if isinstance(word, int):
                    self._heard = time.monotonic()
                    self._tell(shard, word)
                elif isinstance(word, Future) and (made := self._outcome(shard, word)) is not None:
                    self._heard = time.monotonic()
                    self._tell(shard, self._shards[shard].rows)
                    yield made
                    self._heard = time.monotonic()  # the caller may have taken long to commit it
                elif time.monotonic() - self._heard > STALL_SECONDS:
                    self._require_work()
        finally:
            self._stop()

    def _submit(self) -> None:
        """Fill the flight up to its bound."""
        while self._waiting and len(self._flying) < TASKS_A_WORKER * max(1, self._workers()):
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
        """Submit anew what is in flight where workers are there and none computes anything.

        Seen once, after a worker died with finished results: the scheduler said that it would recompute them, and both
        workers stayed idle. The workers themselves are asked, for the scheduler may believe that they compute.
        """
        self._heard = time.monotonic()
        if not self._workers():
            return
        with contextlib.suppress(
            OSError, TimeoutError, RuntimeError
        ):  # a worker goes away meanwhile: ask again later
            if (
                self._client.sync(self._connected().call_stack, callback_timeout=ANSWER_SECONDS)
                == {}
            ):
                self._submit_anew()

    def _submit_anew(self) -> None:
        """Put all that is in flight back in line."""
        logger.warning(
            "every worker is idle with %d shards in flight: submitting them anew", len(self._flying)
        )
        print(
            f"no worker computes any of {len(self._flying)} shards: submitting them anew",
            file=sys.stderr,
            flush=True,
        )
        for shard in sorted(self._flying, reverse=True):
            state = self._shards[shard]
            future = state.future
            state.future = None
            if future is not None:
                future.release()
            self._waiting.append(shard)
        self._flying.clear()

    def _workers(self) -> int:
        """Return how many workers there were within the last second. Raises ClusterError without a scheduler."""
        if time.monotonic() - self._counted > COUNT_SECONDS:
            self._count = len(self._addresses())
            self._counted = time.monotonic()
        return self._count

    def _addresses(self) -> list[str]:
        """Return the workers that are connected. Raises ClusterError without a scheduler."""
        scheduler = self._connected()
        try:
            # The client's own method waits for ever where a scheduler takes a question and dies over it.
            return list(self._client.sync(scheduler.ncores, callback_timeout=ANSWER_SECONDS))
        except (OSError, TimeoutError, RuntimeError) as error:
            raise self._lost(one_line(error)) from error

    def _connected(self) -> Any:
        """Return the scheduler to ask. Raises ClusterError where the connection is lost: all that flew is cancelled."""
        scheduler = self._client.scheduler
        if scheduler is None or self._client.status != "running":
            raise self._lost("the connection to it is lost")
        return scheduler

    def _next(self) -> "tuple[int, int | Attempt | None]":
        """Return the next word, or None after a while; say now and then that there is no worker to give one."""
        if self._workers():
            self._alone = time.monotonic()
        elif time.monotonic() - self._alone > WAIT_SECONDS:
            self._alone = time.monotonic()
            print(
                "no worker is connected to the scheduler: waiting for one",
                file=sys.stderr,
                flush=True,
            )
        try:
            return self._events.get(timeout=COLLECT_SECONDS)
        except queue.Empty:
            return 0, None

    def _outcome(self, shard: int, future: Attempt) -> WrittenShard | None:
        """Take a finished task out of the flight; None where its shard is to be tried again."""
        if future is not self._shards[shard].future:
            return None  # an attempt that was given up
        try:
            made = future.result(timeout=COLLECT_SECONDS)
        except TimeoutError:  # the worker died with it, and it is computed anew
            self._events.put((shard, future))
            return None
        except KilledWorker as error:
            address = error.last_worker.address
            made = Failed(
                worker=address,
                reason="its workers died over it: killed, or out of memory",
                final=False,
            )
        except Exception as error:
            if future.status in ("cancelled", "lost"):
                raise self._lost(one_line(error)) from error
            raise ClusterError(
                f"a worker cannot run the task ({one_line(error)}): install dtcache {__version__} and the other "
                "packages of the coordinator where the workers run"
            ) from error
        self._flying.remove(shard)
        self._shards[shard].future = None
        if isinstance(made, WrittenShard):
            return made
        self._failed(shard, made)
        return None

    def _failed(self, shard: int, failure: Failed) -> None:
        """Put a shard back for another worker. Raises ClusterError where that would be in vain."""
        failed = self._shards[shard].failed
        failed.append(failure)
        if failure.final:
            raise ClusterError(f"worker {failure.worker}: {failure.reason} ({RESUME})")
        logger.warning("shard %d failed on %s: %s", shard, failure.worker, failure.reason)
        if len(failed) >= MOST_ATTEMPTS:
            where = ", ".join(dict.fromkeys(f.worker for f in failed))
            raise ClusterError(
                f"shard {shard} failed {len(failed)} times, on {where}; the last time: {failure.reason} ({RESUME})"
            )
        self._waiting.append(shard)

    def _tell(self, shard: int, rows: int) -> None:
        """Tell the bar of rows that no attempt had done before."""
        state = self._shards[shard]
        if rows > state.reported:
            self._on_rows(rows - state.reported)
            state.reported = rows

    def _stop(self) -> None:
        """Let go of everything in flight; a worker in the middle of a task ends it, and nobody takes the result."""
        with contextlib.suppress(Exception):  # the scheduler may be what has gone away
            self._client.unsubscribe_topic(self._name)
            for state in self._shards.values():
                if state.future is not None:
                    state.future.release()

    def _lost(self, reason: str) -> ClusterError:
        return ClusterError(
            f"the Dask scheduler has gone away or given up the work ({reason}); {RESUME}"
        )
