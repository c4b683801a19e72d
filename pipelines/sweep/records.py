"""Records of finished steps: identity, result, CPU and wall seconds over all sessions."""

import json
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dtcache._version import __version__
from dtcache.atomic_files import make_folders, write_file
from dtcache.errors import CacheDamagedError, CacheMismatchError
from dtcache.json_files import read_json
from dtcache.recipe import Json
from pipelines.terminal.output import report

MAX_BYTES = 16 << 20
SAVE_SECONDS = 10.0
"""Seconds between records of the time that an unfinished step has taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A piece of work that is done once: a cache, the training of a student, an evaluation."""

    title: str
    """For messages, such as `arm mse, seed 0`."""
    kind: str
    """Steps of one kind take about as long, such as the students of an arm."""
    record: Path
    """JSON file that the step is recorded in."""
    identity: Json
    """Everything that its result depends on, by field."""
    output: Path | None = None
    """File that the step leaves; if it is missing, the step is done again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What is known of a step that has begun."""

    identity: Json
    result: Json | None
    """None until the step is finished."""
    cpu_seconds: float
    """User and system time of the processes that did the step, over all sessions."""
    wall_seconds: float
    shared: int
    """Steps that were done together; the seconds are an equal share of what they took."""
    version: str
    """Version of dtcache."""
    commit: str
    """Commit of dtcache, if it runs from a git checkout, else empty."""


def read_record(step: Step) -> Record | None:
    """Return the record of a step, or None if it has not begun.

    Raises CacheMismatchError, naming the field, if the step was done with other options, and
    CacheDamagedError if the file is not a record.
    """
    if not step.record.exists():
        return None
    try:
        record = Record(**read_json(step.record, MAX_BYTES))
        recorded = dict(record.identity)
        _require_types(record)
    except (OSError, ValueError, TypeError) as error:
        raise CacheDamagedError(
            f"{step.record}: not a record of this sweep ({error}); delete it to do the step again"
        ) from error
    for name, value in _plain(step.identity).items():
        if recorded.get(name) != value:
            raise CacheMismatchError(
                f"{step.title}: was done with another {name}: expected {recorded.get(name)!r}, got "
                f"{value!r}; change it back, or pass a new name or another `out`"
            )
    return record


def _require_types(record: Record) -> None:
    """Raise TypeError unless the fields of a record have their types and its counts are 0 or more.

    A dataclass does not check them.
    """
    for name in ("cpu_seconds", "wall_seconds", "shared"):
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
            raise TypeError(f"{name} is {str(value)[:40]!r}")
    if not isinstance(record.result, dict | None) or not isinstance(record.shared, int):
        raise TypeError("its result is not an object, or shared is not an integer")
    if not isinstance(record.version, str) or not isinstance(record.commit, str):
        raise TypeError("its version or its commit is not text")


def finished(step: Step) -> Record | None:
    """Return the record of a step that is finished and whose output exists, else None.

    Raises what `read_record` raises.
    """
    record = read_record(step)
    there = step.output is None or step.output.exists()
    return record if record is not None and record.result is not None and there else None


def perform(steps: Sequence[Step], work: Callable[[], Sequence[Json | None]]) -> None:
    """Do steps together, unless they are done.

    `work` returns the result of each step, or None for one that it could not finish.

    While it works, the time that it takes is recorded every few seconds, so that a killed session
    counts too. The records share the time equally.
    """
    if all(finished(step) is not None for step in steps):
        return
    before = [read_record(step) for step in steps]
    cpu = [record.cpu_seconds if record else 0.0 for record in before]
    wall = [record.wall_seconds if record else 0.0 for record in before]
    commit = _commit()
    started = time.monotonic()
    cpu_started = cpu_seconds()

    def save(results: Sequence[Json | None]) -> None:
        shares = (cpu_seconds() - cpu_started) / len(steps)
        seconds = (time.monotonic() - started) / len(steps)
        for step, result, c, w in zip(steps, results, cpu, wall, strict=True):
            record = Record(
                identity=_plain(step.identity),
                result=result,
                cpu_seconds=round(c + shares, 3),
                wall_seconds=round(w + seconds, 3),
                shared=len(steps),
                version=__version__,
                commit=commit,
            )
            make_folders(step.record.parent)
            write_file(step.record, json.dumps(asdict(record), indent=1).encode())

    unfinished: list[Json | None] = [None] * len(steps)
    save(unfinished)
    with _repeated(SAVE_SECONDS, lambda: save(unfinished)):
        results = work()
    save(results)
    titles = "; ".join(step.title for step in steps)
    report(f"{titles}: done in {time.monotonic() - started:.1f} s")


def cpu_seconds() -> float:
    """Return user and system time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def _repeated(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` in another thread every few seconds while the block runs."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _plain(value: Json) -> Json:
    """Return JSON values as a file of them would be read."""
    plain: Json = json.loads(json.dumps(value, default=str))
    return plain


def _commit() -> str:
    """Return the commit of the checkout that dtcache runs from, or nothing."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return ""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done: subprocess.CompletedProcess[Any] = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=environment, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return str(done.stdout).strip() if done.returncode == 0 else ""
