"""Doing one job in a process of its own: output, end and failure. Loads torch only with a job."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from dtcache.errors import DtcacheError, one_line
from pipelines.sweep.jobs import Job
from pipelines.terminal.output import report, say

WATCH_SECONDS = 1.0
"""Seconds between looks whether the coordinator's process still lives."""
ALONE = threading.Lock()
"""Held during a job: a process has one standard output, so that it does one job at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a job ended."""

    failure: str | None
    """One line, or None if the job is finished."""
    seconds: float


def do_job(job: Job, log: Path) -> Outcome:
    """Do a job, with everything that it prints in its log file; never raises an exception of it.

    A failure that dtcache raises on purpose is one line in the log, any other one has a traceback.
    """
    started = time.monotonic()
    failure = None
    with ALONE, _output_to(log):
        report(f"{time.strftime('--- %Y-%m-%d %H:%M:%S')} {job.name}")
        try:
            job.do()
        except DtcacheError as error:
            failure = one_line(error)
            say(f"failed: {failure}")
        except Exception as error:
            failure = one_line(error) if str(error) else type(error).__name__
            failure = f"{type(error).__name__}: {failure}"
            for line in traceback.format_exc().splitlines():
                say(line)
    return Outcome(failure=failure, seconds=time.monotonic() - started)


def prepare_worker(environment: Mapping[str, str], coordinator: int) -> None:
    """Prepare a local worker process: its variables, Ctrl-C, and its end with the coordinator.

    `environment` must be set before torch is loaded. The coordinator handles Ctrl-C. If the
    coordinator is killed, this process ends too: a new coordinator does its job again.
    """
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == coordinator:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Append stdout and stderr of this process to a file, also those of libraries in C."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {stream: os.dup(stream) for stream in (1, 2)}
    try:
        with open(log, "a", buffering=1, encoding="utf-8", errors="backslashreplace") as file:
            for stream in saved:
                os.dup2(file.fileno(), stream)
            with redirect_stdout(file), redirect_stderr(file):
                yield
    finally:
        for stream, copy in saved.items():
            os.dup2(copy, stream)
            os.close(copy)
