"""Where workers come from: processes on this machine, or a scheduler that somebody runs; where their chatter goes."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import dask
from dask.distributed import Client, Nanny, Scheduler, SpecCluster, Worker, WorkerPlugin

from dtcache.atomic_files import disk_errors
from dtcache.errors import ClusterError, one_line

CONNECT_SECONDS = 30
CLOSE_SECONDS = 60
DASHBOARD_PORT = 8787
DEATHS_AN_ATTEMPT = 2
"""Deaths of workers that have a shard at work or in line which Dask makes good before that attempt counts as failed."""
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
    """Sends all that a local worker prints to a file, and leaves Ctrl-C, which reaches it too, to the coordinator."""

    def __init__(self, log: str) -> None:
        self._log = log

    def setup(self, worker: Worker) -> None:
        """Redirect the streams, and with them those of every library, of the worker's process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        handle = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(handle, stream)
        os.close(handle)

    def teardown(self, worker: Worker) -> None:
        """End the process at once: it holds nothing, while a task in the middle, or libraries, would take seconds."""
        os._exit(0)


@contextlib.contextmanager
def local_cluster(
    environments: Sequence[Mapping[str, str]], *, dashboard: bool, log: Path
) -> Iterator[Client]:
    """Start a worker process of one thread for each environment, and stop them all at the end.

    No memory limit kills a worker, every port is of 127.0.0.1, and what Dask and the workers say goes to `log`. Raises
    ClusterError where they cannot be started.
    """
    if dashboard:
        _require_bokeh()
    settings = {
        # Dask would set OMP_NUM_THREADS, here too: how many threads compute is the recipe's to say.
        "distributed.nanny.pre-spawn-environ": {},
        # It would also give a worker up for ever that is not back this long after it died, or that died again by then.
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
            "allowed_failures": DEATHS_AN_ATTEMPT,
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
                    f"--workers {len(workers)}: cannot start ({one_line(error)}); see {log}"
                ) from error
            try:
                if dashboard:
                    print(f"dashboard: {cluster.dashboard_link}", file=sys.stderr, flush=True)
                with Client(cluster, set_as_default=False) as client:
                    yield client
            finally:
                with contextlib.suppress(
                    TimeoutError
                ):  # what has not ended by then dies with this process
                    cluster.close(timeout=CLOSE_SECONDS)


@contextlib.contextmanager
def existing_cluster(address: str, *, log: Path) -> Iterator[Client]:
    """Connect to a scheduler that somebody else runs. Raises ClusterError where it cannot be reached."""
    with _logged(log):
        try:
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(
                f"--scheduler {address}: no Dask scheduler can be reached there ({one_line(error)}); start one with "
                "dask scheduler, or give the address that it printed"
            ) from error
        with client:
            yield client


def _require_bokeh() -> None:
    try:
        import bokeh  # noqa: F401
    except ImportError as error:
        raise ClusterError(
            "--dashboard: Dask draws it with bokeh, which is not installed; pip install bokeh"
        ) from error


@contextlib.contextmanager
def _logged(log: Path) -> Iterator[None]:
    """Send what Dask and its libraries log in this process to a file, begun anew."""
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
