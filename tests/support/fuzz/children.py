"""Runs functions in forked processes with limits of time and memory."""

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ADDRESS_SPACE = 4 << 30
"""Bytes of address space that a child may map beyond those of its parent."""
FILE_BYTES = 256 << 20
"""Largest file that a child may write."""
HARNESS_FAILED = 99
TRACEBACK = 98


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a child ended."""

    exit_code: int | None
    """None if a signal ended the child."""
    signal: int | None
    timed_out: bool
    seconds: float
    peak_bytes: int
    """Growth of the resident memory after `prepare`, at its peak."""


@dataclass(slots=True)
class Child:
    """A running child."""

    pid: int
    started: float
    folder: Path
    timed_out: bool = False

    def poll(self, seconds: float) -> Ending | None:
        """Return how the child ended, or None if it runs; kill it after a number of seconds."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            if not self.timed_out and time.monotonic() - self.started > seconds:
                self.timed_out = True
                os.killpg(self.pid, signal.SIGKILL)
            return None
        with contextlib.suppress(ProcessLookupError):
            # Whatever the child started ends with it.
            os.killpg(self.pid, signal.SIGKILL)
        baseline = self.folder / "baseline"
        before = int(baseline.read_text()) if baseline.exists() else usage.ru_maxrss << 10
        return Ending(
            exit_code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            timed_out=self.timed_out,
            seconds=time.monotonic() - self.started,
            peak_bytes=max(0, (usage.ru_maxrss << 10) - before),
        )


def start(folder: Path, prepare: Callable[[], None], work: Callable[[], int]) -> Child:
    """Fork a child that runs `prepare`, then `work` under limits with its output in `folder`.

    The child's exit code is that of `work`, TRACEBACK if `work` raised, or HARNESS_FAILED if
    `prepare` did.
    """
    pid = os.fork()
    if pid:
        return Child(pid=pid, started=time.monotonic(), folder=folder)
    code = HARNESS_FAILED
    try:
        os.setsid()
        _redirect(folder)
        prepare()
        _limit(folder)
        code = TRACEBACK
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _redirect(folder: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    home = folder / "home"
    home.mkdir()
    os.environ.update(HOME=str(home), XDG_CACHE_HOME=str(home / "cache"), COLUMNS="120")
    os.chdir(folder)


def _limit(folder: Path) -> None:
    # The peak of `prepare` is not the command's.
    Path("/proc/self/clear_refs").write_text("5")
    pages = Path("/proc/self/statm").read_text().split()
    size = os.sysconf("SC_PAGE_SIZE")
    (folder / "baseline").write_text(str(int(pages[1]) * size))
    limit = int(pages[0]) * size + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
