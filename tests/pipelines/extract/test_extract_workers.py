"""Stage 1 on clusters through the command line: worker counts and worker deaths change no byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from store.builders import tree

from dtcache.options import ExtractOptions
from pipelines.extract.extract import extract

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = ExtractOptions(
    teacher="",
    precision="fp32",
    device="cpu",
    batch_size=8,
    shard_rows=4,
    bytes_per_image=4608,
    threads=1,
)
FLAGS = (
    "--precision=fp32",
    "--device=cpu",
    "--batch-size=8",
    "--shard-rows=4",
    "--bytes-per-image=4608",
    "--threads=1",
)
SHARDS = 10

pytestmark = pytest.mark.slow


def command(images: Path, teacher: Path, out: Path, *more: object) -> list[str]:
    """Return the command line of an extraction of ten shards."""
    arguments = ["extract", images, "--teacher", teacher, "--out", out, *FLAGS, *more]
    return [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]


def hear_interrupts() -> None:
    """Restore the default SIGINT, which a shell ignores in background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run an extraction in its own session, as from a terminal, to find all of its processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command(*arguments),
        env=environment,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=hear_interrupts,
    ) as process:
        try:
            yield process
        finally:
            for pid in session(process.pid):
                os.kill(pid, signal.SIGKILL)


def session(leader: int) -> list[int]:
    """Return the live processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = stat.read_text().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        if int(own) == leader and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def left_over(leader: int, seconds: float) -> list[int]:
    """Return what is still alive of a session after at most so many seconds.

    Python's resource tracker ends itself once the last process that used it has gone: on a busy
    machine that is after the leader's own end.
    """
    deadline = time.monotonic() + seconds
    while session(leader) and time.monotonic() < deadline:
        time.sleep(0.05)
    return session(leader)


def workers(leader: int) -> list[int]:
    """Return the worker processes of a session, which Dask's nannies spawned."""
    lines = {pid: Path(f"/proc/{pid}/cmdline") for pid in session(leader) if pid != leader}
    return [
        pid for pid, line in lines.items() if line.exists() and b"spawn_main" in line.read_bytes()
    ]


def committed(out: Path) -> int:
    """Return how many shards of a cache are committed."""
    return len(list((out / "commits").glob("0*.json")))


def content(out: Path) -> dict[str, bytes | None]:
    """Return a cache's files without the logs."""
    return {name: data for name, data in tree(out).items() if name != "cluster.log"}


@pytest.fixture(scope="module")
def one(
    scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes | None]:
    """The files that a single process writes."""
    out = tmp_path_factory.mktemp("one") / "cache"
    extract(scene_folder, out, replace(OPTIONS, teacher=str(teacher_dir)))
    return content(out)


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_workers_makes_the_same_bytes(
    count: int, one: dict[str, bytes | None], scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Two or four workers write one process's bytes, print nothing and leave no process."""
    with running(scene_folder, teacher_dir, tmp_path / "c", "--workers", count) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait() == 0
        assert left_over(process.pid, seconds=30) == []
    assert content(tmp_path / "c") == one
    assert not [line for line in said.splitlines() if "distributed" in line or "Worker" in line], (
        said
    )


def test_workers_killed_at_random_change_no_byte(
    one: dict[str, bytes | None], scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Four SIGKILLs of workers at random moments of one run change no byte."""
    rng = random.Random(3)
    kills = 0
    seen = 0
    with running(scene_folder, teacher_dir, tmp_path / "c", "--workers", 2) as process:
        while process.poll() is None:
            if kills < 4 and committed(tmp_path / "c") > seen:
                seen = committed(tmp_path / "c")
                time.sleep(rng.uniform(0, 0.3))
                living = workers(process.pid)
                if living:
                    os.kill(rng.choice(living), signal.SIGKILL)
                    kills += 1
            time.sleep(0.01)
        assert process.returncode == 0
    assert kills >= 3
    assert content(tmp_path / "c") == one


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_coordinator_leaves_no_worker_and_resumes(
    how: signal.Signals,
    one: dict[str, bytes | None],
    scene_folder: Path,
    teacher_dir: Path,
    tmp_path: Path,
) -> None:
    """Ctrl-C or a kill of the coordinator ends all workers, and one process can resume.

    Ctrl-C, which every process of the terminal receives, exits with 130 and leaves no temporary
    file.
    """
    out = tmp_path / "c"
    with running(scene_folder, teacher_dir, out, "--workers", 2) as process:
        while committed(out) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        if how is signal.SIGINT:
            os.killpg(process.pid, how)
            assert process.wait(30) == 130
            assert process.stdout is not None
            said = process.stdout.read()
            assert "Interrupted; run the same command again to resume." in said
            assert "Traceback" not in said
            assert not list(out.rglob(".tmp-*"))
        else:
            process.kill()
            process.wait()
        assert left_over(process.pid, seconds=30) == []
    assert committed(out) < SHARDS
    extract(scene_folder, out, replace(OPTIONS, teacher=str(teacher_dir)))
    assert content(out) == one


def test_a_scheduler_as_the_manual_starts_it(
    one: dict[str, bytes | None], scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """The commands of docs/clusters.md write the same bytes and leave the cluster running."""
    manual = (ROOT / "docs" / "clusters.md").read_text()
    assert "dask scheduler --port 8786" in manual
    assert "dask worker tcp://HOST:8786 --nworkers 1 --nthreads 1 --memory-limit 0 " in manual
    dask = [sys.executable, "-m", "dask"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    at = tmp_path / "scheduler.json"
    start = {
        "env": environment,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "start_new_session": True,
    }
    served = [
        *dask,
        "scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--no-dashboard",
        "--scheduler-file",
        str(at),
    ]
    with subprocess.Popen(served, **start) as scheduler:
        while not at.exists():
            assert scheduler.poll() is None
            time.sleep(0.05)
        address = json.loads(at.read_text())["address"]
        work = [
            *dask,
            "worker",
            address,
            "--nworkers",
            "1",
            "--nthreads",
            "1",
            "--memory-limit",
            "0",
            "--no-dashboard",
        ]
        with subprocess.Popen(work, **start) as worker:
            with running(
                scene_folder, teacher_dir, tmp_path / "c", "--scheduler", address
            ) as process:
                assert process.wait() == 0
            assert (scheduler.poll(), worker.poll()) == (None, None)
            for pid in session(worker.pid):
                os.kill(pid, signal.SIGKILL)
        scheduler.kill()
    assert content(tmp_path / "c") == one
