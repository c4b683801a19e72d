"""Dask clusters: local worker processes, or a running scheduler; and the file for their logs."""

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import dask
from dask.distributed import Client, Nanny, Scheduler, SpecCluster, Worker, WorkerPlugin

from dtcache.atomic_files import disk_errors
from dtcache.errors import ClusterError, one_line
from pipelines.terminal.output import say

CONNECT_SECONDS = 30
CLOSE_SECONDS = 60
DASHBOARD_PORT = 8787
DEATHS_PER_ATTEMPT = 2
"""How often Dask retries a task whose worker died, before the attempt at the shard fails."""
CHATTY = (
    "distributed",
    "distributed.client",
    "distributed.gc",
    "bokeh",
    "tornado",
    "tornado.application",
    "asyncio",
)


class Quiet(WorkerPlugin):
    """Sends a local worker's output to a file; ignores Ctrl-C, which the coordinator handles."""

    def __init__(self, log: str) -> None:
        self._log = log

    def setup(self, worker: Worker) -> None:
        """Redirect stdout and stderr of the worker's process, also for libraries in C."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        handle = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(handle, stream)
        os.close(handle)

    def teardown(self, worker: Worker) -> None:
        """End the process at once: it has no state, and a running task could take seconds."""
        os._exit(0)


@contextlib.contextmanager
def local_cluster(
    environments: Sequence[Mapping[str, str]], *, dashboard: bool, log: Path
) -> Iterator[Client]:
    """Start a worker process of one thread for each environment, and stop them all at the end.

    Workers have no memory limit, and every port is on 127.0.0.1. Messages of Dask and the workers
    go to `log`. Raises ClusterError if the workers cannot be started.
    """
    if dashboard:
        _require_bokeh()
    settings = {
        # Dask would set OMP_NUM_THREADS, but the recipe determines the number of threads.
        "distributed.nanny.pre-spawn-environ": {},
        # By default, Dask gives up on a worker that is not back within this time after its death,
        # or that dies again within this time.
        "distributed.deploy.lost-worker-timeout": "1000 days",
    }
    with (
        tempfile.TemporaryDirectory(
            prefix="dtcache-workers-", ignore_cleanup_errors=True
        ) as scratch,
        _logged(log),
    ):
        common = {
            "host": "127.0.0.1",
            "nthreads": 1,
            "memory_limit": None,
            "dashboard": False,
            "local_directory": scratch,
            "silence_logs": logging.WARNING,
            "plugins": (Quiet(str(log.absolute())),),
        }
        workers = {
            i: {"cls": Nanny, "options": {**common, "env": dict(e)}}
            for i, e in enumerate(environments)
        }
        address = f"127.0.0.1:{DASHBOARD_PORT if dashboard else 0}"
        served = {
            "dashboard": dashboard,
            "dashboard_address": address,
            "allowed_failures": DEATHS_PER_ATTEMPT,
        }
        scheduler = {
            "cls": Scheduler,
            "options": {"host": "127.0.0.1", "port": 0, "local_directory": scratch, **served},
        }
        with dask.config.set(settings):
            try:
                cluster = SpecCluster(workers=workers, scheduler=scheduler)
            except (RuntimeError, OSError, TimeoutError) as error:
                raise ClusterError(
                    f"`workers` {len(workers)}: cannot start ({one_line(error)}); see {log}"
                ) from error
            try:
                if dashboard:
                    say(f"dashboard: {cluster.dashboard_link}")
                with Client(cluster, set_as_default=False) as client:
                    yield client
            finally:
                # Workers that are still running end with this process.
                with contextlib.suppress(TimeoutError):
                    cluster.close(timeout=CLOSE_SECONDS)


@contextlib.contextmanager
def existing_cluster(address: str, *, log: Path) -> Iterator[Client]:
    """Connect to a running scheduler. Raises ClusterError if it cannot be reached."""
    with _logged(log):
        try:
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(
                f"`scheduler` {address}: no Dask scheduler can be reached there "
                f"({one_line(error)}); start one with dask scheduler, or pass the address that it "
                "printed"
            ) from error
        with client:
            yield client


def _require_bokeh() -> None:
    try:
        import bokeh  # noqa: F401
    except ImportError as error:
        raise ClusterError(
            "`dashboard`: Dask needs bokeh for it, which is not installed; pip install bokeh"
        ) from error


@contextlib.contextmanager
def _logged(log: Path) -> Iterator[None]:
    """Send the logs of Dask and its libraries in this process to `log`, which is overwritten."""
    with disk_errors(log):
        handler = logging.FileHandler(log, mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = {name: logging.getLogger(name).handlers for name in CHATTY}
    for name in CHATTY:
        logging.getLogger(name).handlers = [handler]
    try:
        yield
    finally:
        for name, handlers in before.items():
            logging.getLogger(name).handlers = handlers
        handler.close()
