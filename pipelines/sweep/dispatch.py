"""Running the jobs of a sweep: in local processes, or on the workers of a Dask cluster."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dtcache.errors import ClusterError, ConfigError, one_line
from dtcache.options import SweepOptions
from pipelines.sweep.jobs import Job
from pipelines.sweep.plan import Plan
from pipelines.sweep.work import Outcome, do_job, prepare_worker
from pipelines.terminal.output import say
from pipelines.terminal.progress import Tracker

POLL_SECONDS = 1.0
START_SECONDS = 60.0
"""Longest wait for a process that is just starting, before it can be ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A job that is not finished."""

    job: str
    reason: str
    """One line."""
    log: Path | None
    """None if the job was not started."""

    def __str__(self) -> str:
        """Return the failure as one line."""
        return f"{self.job}: {self.reason}" + (f"; see {self.log}" if self.log else "")


class Workers(Protocol):
    """Processes that do jobs."""

    def is_free(self) -> bool:
        """Return whether to submit another job now. Raises ClusterError if no worker is left."""

    def submit(self, job: Job, log: Path) -> "Future[Outcome]":
        """Start a job."""


def run_jobs(
    plan: Plan,
    left: Sequence[Job],
    workers: Workers,
    progress: Tracker,
    on_finished: Callable[[], object],
) -> list[Failure]:
    """Do the jobs that are left, each after those that it needs; return those that failed.

    `on_finished` is called after every job that has ended. A failed job does not stop the others;
    jobs that need it are not started.
    """
    waiting = list(left)
    running: dict[Future[Outcome], Job] = {}
    failures: dict[str, Failure] = {}
    while waiting or running:
        unfinished = {job.name for job in (*waiting, *running.values())}
        for job in list(waiting):
            if lacking := sorted(job.after & failures.keys()):
                failures[job.name] = Failure(
                    job=job.name, reason=f"needs {lacking[0]}, which failed", log=None
                )
                say(f"not started: {failures[job.name]}")
                waiting.remove(job)
                progress.advance(1)
            elif not job.after & unfinished and workers.is_free():
                running[workers.submit(job, plan.log(job))] = job
                waiting.remove(job)
        progress.advance(0, _note(list(running.values()), failures))
        for future in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
            job = running.pop(future)
            reason = _failure(future)
            if reason is not None:
                failures[job.name] = Failure(job=job.name, reason=reason, log=plan.log(job))
                say(f"failed: {failures[job.name]}")
            on_finished()
            progress.advance(1, _note(list(running.values()), failures))
    return list(failures.values())


@contextmanager
def start_workers(plan: Plan, options: SweepOptions) -> Iterator[Workers]:
    """Yield the workers that the options name, and stop them at the end.

    Raises ConfigError for more jobs than GPUs, and ClusterError if no scheduler can be reached.
    """
    if options.scheduler is None:
        workers = LocalWorkers(environments(options.jobs, _devices(plan)))
        try:
            yield workers
        finally:
            workers.stop()
        return
    if options.jobs is not None:
        raise ConfigError(
            "`jobs`: expected no number with `scheduler`, which gives each of its workers a job"
        )
    from pipelines.extract.workers.cluster import existing_cluster  # loads Dask

    with existing_cluster(options.scheduler, log=plan.out / "cluster.log") as client:
        yield ClusterWorkers(client)


class LocalWorkers:
    """Processes of this machine, each with an environment of its own.

    A process does job after job and loads torch once. If it dies, its job has failed, and the next
    job gets a new process.
    """

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self._slots = [_Slot(environment) for environment in environments]

    def is_free(self) -> bool:
        """Return whether a process has no job."""
        return any(slot.is_free for slot in self._slots)

    def submit(self, job: Job, log: Path) -> "Future[Outcome]":
        """Start a job in a process that has none."""
        return next(slot for slot in self._slots if slot.is_free).submit(job, log)

    def stop(self) -> None:
        """End all processes, also in the middle of a job."""
        for slot in self._slots:
            slot.stop()


class _Slot:
    """One local process, and the last job that it was given."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._pool: ProcessPoolExecutor | None = None
        self._process: Future[int] | None = None
        self._job: Future[Outcome] | None = None

    @property
    def is_free(self) -> bool:
        return self._job is None or self._job.done()

    def submit(self, job: Job, log: Path) -> "Future[Outcome]":
        if self._job is not None and self._job.exception() is not None:
            self.stop()
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=prepare_worker,
                initargs=(self._environment, os.getpid()),
            )
            self._process = self._pool.submit(os.getpid)
        self._job = self._pool.submit(do_job, job, log)
        return self._job

    def stop(self) -> None:
        if self._pool is None:
            return
        if not self.is_free and self._process is not None:
            # What a job writes is atomic, and the next sweep resumes it.
            with contextlib.suppress(ProcessLookupError, BrokenProcessPool, TimeoutError):
                os.kill(self._process.result(START_SECONDS), signal.SIGKILL)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None


class ClusterWorkers:
    """The workers of a Dask scheduler, which share the file system with this process."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._executor = client.get_executor(pure=False)

    def is_free(self) -> bool:
        """Return True: the scheduler keeps the jobs for which no worker is free.

        Raises ClusterError if the scheduler is lost.
        """
        if self._client.status != "running":
            raise ClusterError(
                "the connection to the Dask scheduler is lost; run the same command again to resume"
            )
        return True

    def submit(self, job: Job, log: Path) -> "Future[Outcome]":
        """Submit a job to the scheduler."""
        future: Future[Outcome] = self._executor.submit(do_job, job, log)
        return future


def environments(jobs: int | None, devices: set[str]) -> list[dict[str, str]]:
    """Return the environment variables of each local process: its GPU, or its number of threads.

    Raises ConfigError if there are more jobs than GPUs.
    """
    gpus = _gpus() if devices != {"cpu"} else 0
    if not gpus:
        count = jobs or 1
        cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        # One job computes as `dtcache train` does.
        threads = {"OMP_NUM_THREADS": str(max(1, cores // count))} if count > 1 else {}
        return [dict(threads) for _ in range(count)]
    count = jobs or gpus
    if count > gpus:
        raise ConfigError(
            f"`jobs` {count}: expected at most one per GPU, and this machine has {gpus}"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names.split(",")[:count]]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _devices(plan: Plan) -> set[str]:
    """Return the devices that the sweep's options name."""
    return {arm.train.device for arm in plan.file.arms} | {
        task.options.device for task in plan.file.tasks
    }


def _failure(future: "Future[Outcome]") -> str | None:
    """Return why a job that has ended failed, or None."""
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        return "its process died: killed, or out of memory"
    if error is not None:
        return one_line(error)
    return future.result().failure


def _note(running: Sequence[Job], failures: Mapping[str, Failure]) -> str:
    names = ", ".join(job.name.removeprefix("runs/") for job in running[:4])
    more = f" and {len(running) - 4} more" if len(running) > 4 else ""
    failed = f"; {len(failures)} failed" if failures else ""
    return f"running: {names}{more}{failed}" if running else failed.removeprefix("; ")
