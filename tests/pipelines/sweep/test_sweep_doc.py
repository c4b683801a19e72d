"""The worked example of docs/sweep.md: its file and its commands."""

import re
import shutil
from pathlib import Path

import pytest
from support.cli import run
from sweep_files import in_process

import dtcache
from pipelines.sweep import sweep as stage
from pipelines.write_scenes import write_scenes

DOC = Path(__file__).resolve().parents[3] / "docs" / "sweep.md"
SMALLER = {
    "seeds = [0, 1, 2]": "seeds = [0]",
    'student = "resnet10t"': 'student = "test_resnet"\nprecision = "fp32"\ndevice = "cpu"',
    "student_size = 64": "student_size = 32",
    "epochs = 8\n": "epochs = 1\nwarmup_epochs = 0\n",
    "batch_size = 32": "batch_size = 8",
    "epochs = 10\n": "epochs = 1\n",
}


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the example, with fewer scenes."""
    text = DOC.read_text()
    assert "dtcache scenes --count 300 --out scenes/train" in text
    write_scenes(tmp_path / "scenes/train", seed=0, size=64, count=60)
    write_scenes(tmp_path / "scenes/test", seed=0, size=64, count=60, start=1_000_000)
    shutil.copytree(Path(dtcache.__path__[0]) / "assets/scenes-teacher", tmp_path / "teacher")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    (tmp_path / "losses.toml").write_text(block)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_lists_its_jobs(example: Path) -> None:
    """The dry run lists the cache and nine students."""
    result = run("sweep", "losses.toml", "--out", "sweeps/losses", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "10 of 10 jobs left" in result.output
    assert not (example / "sweeps").exists()
    assert "one job for the cache and nine for students" in DOC.read_text()


@pytest.mark.slow
def test_the_example_runs(example: Path, monkeypatch: pytest.MonkeyPatch, no_fsync: None) -> None:
    """The example makes its cache, trains, evaluates and reports, with smaller numbers."""
    text = (example / "losses.toml").read_text()
    for old, new in SMALLER.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (example / "losses.toml").write_text(text)
    monkeypatch.setattr(stage, "start_workers", in_process)
    result = run("sweep", "losses.toml", "--out", "sweeps/losses")
    assert result.exit_code == 0, result.output
    report = (example / "sweeps/losses/report.md").read_text()
    assert "3 of 3 students are finished" in report
    assert "## parts: mean IoU, per cent" in report
    assert "| mse-at |" in report
    assert run("inspect", "sweeps/losses/caches/scenes").exit_code == 0
