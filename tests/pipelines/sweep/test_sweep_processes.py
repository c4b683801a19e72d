"""Jobs in processes of their own: kills, resume, a process that dies, and a Dask cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.cli import run
from sweep_files import in_process, sweep_text

from dtcache.errors import ConfigError
from pipelines.extract.workers.cluster import local_cluster
from pipelines.sweep import dispatch
from pipelines.sweep import sweep as stage
from pipelines.sweep.dispatch import environments

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 300.0


def started(folder: Path) -> "subprocess.Popen[bytes]":
    """Start the sweep s.toml of a folder in another process; its output is in the file output."""
    command = [sys.executable, str(ROOT / "cli.py"), "sweep", "s.toml", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(folder / "output", "wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=environment
        )


def children(process: int) -> list[int]:
    """Return the processes that a process has started and that run a spawned worker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"PPid:\t{process}\n" in status and b"spawn_main" in command:
            found.append(int(folder.name))
    return found


def until(condition: object, what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def results(out: Path) -> dict[str, list[str]]:
    """Return the held-out losses of every run of a sweep."""
    return {
        path.parent.relative_to(out).as_posix(): sorted(
            json.loads(path.read_text())["held_out"].items()
        )
        for path in (out / "runs").rglob("summary.json")
    }


@pytest.mark.slow
def test_a_killed_sweep_resumes_to_the_same_losses(
    scene_cache: Path, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL the worker ends too; the next sweep continues and ends in the same losses."""
    text = sweep_text(scene_cache, scene_folder, seeds="[0]")
    text = text.replace("epochs = 2", "epochs = 40\nsave_every = 1")
    (tmp_path / "s.toml").write_text(text)
    process = started(tmp_path)
    checkpoint = tmp_path / "out/runs/mse/seed-0/checkpoint.pt"
    until(lambda: checkpoint.exists() or process.poll() is not None, "a checkpoint")
    (worker,) = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not Path(f"/proc/{worker}").exists(), "the end of the worker")
    record = tmp_path / "out/records/runs/mse/seed-0/student.json"
    assert json.loads(record.read_text())["result"] is None
    monkeypatch.setattr(stage, "start_workers", in_process)
    for out in ("out", "whole"):
        result = run("sweep", tmp_path / "s.toml", "--out", tmp_path / out)
        assert result.exit_code == 0, result.output
    assert results(tmp_path / "out") == results(tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_dies_fails_its_job_alone(
    scene_cache: Path, scene_folder: Path, tmp_path: Path
) -> None:
    """A killed worker fails one job; the others finish in a new process, with exit code 1."""
    text = sweep_text(scene_cache, scene_folder, seeds="[0]")
    (tmp_path / "s.toml").write_text(text.replace("epochs = 2", "epochs = 400"))
    process = started(tmp_path)
    metrics = tmp_path / "out/runs/mse/seed-0/metrics.jsonl"
    until(lambda: metrics.exists() or process.poll() is not None, "a training")
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    process.wait(PATIENCE)
    output = (tmp_path / "output").read_text()
    assert process.returncode == 1, output
    assert "failed: runs/mse/seed-0: its process died: killed, or out of memory; see" in output
    assert "1 of 2 students are finished" in " ".join(output.split())
    log = (tmp_path / "out/logs/runs/random/seed-0.log").read_text()
    assert "runs/random/seed-0" in log


@pytest.mark.slow
def test_jobs_run_on_a_dask_cluster(scene_cache: Path, scene_folder: Path, tmp_path: Path) -> None:
    """The workers of a scheduler do the jobs, and their output is in the log files."""
    text = sweep_text(scene_cache, scene_folder, seeds="[0]")
    (tmp_path / "s.toml").write_text(text)
    with local_cluster([{}], dashboard=False, log=tmp_path / "dask.log") as client:
        address = client.scheduler.address
        result = run(
            "sweep", tmp_path / "s.toml", "--out", tmp_path / "out", "--scheduler", address
        )
        assert result.exit_code == 0, result.output
        assert client.status == "running"
    assert "2 of 2 students are finished" in " ".join(result.output.split())
    assert "arm mse, seed 0: done in" in (tmp_path / "out/logs/runs/mse/seed-0.log").read_text()


def test_threads_and_gpus_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU jobs share the threads; on GPUs each has one, and more jobs are refused."""
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert environments(None, {"cpu"}) == [{}]
    assert environments(3, {"cpu"}) == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setattr(dispatch, "_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environments(None, {"auto"}) == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "1"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert environments(1, {"auto"}) == [{"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(ConfigError, match=r"`jobs` 3: expected at most one per GPU, and this mac"):
        environments(3, {"auto"})


def test_an_unreachable_scheduler_is_refused(
    scene_cache: Path, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that does not answer, or jobs beside one, is one line."""
    monkeypatch.setattr("pipelines.extract.workers.cluster.CONNECT_SECONDS", 0.2)
    (tmp_path / "s.toml").write_text(sweep_text(scene_cache, scene_folder))
    flags = ("--out", tmp_path / "out", "--scheduler", "tcp://127.0.0.1:1")
    result = run("sweep", tmp_path / "s.toml", *flags)
    assert result.exit_code == 1
    assert "--scheduler tcp://127.0.0.1:1: no Dask scheduler can be reached" in result.output
    both = run("sweep", tmp_path / "s.toml", *flags, "--jobs", 2)
    assert both.exit_code == 2
    assert "--jobs: expected no number with --scheduler" in both.output
