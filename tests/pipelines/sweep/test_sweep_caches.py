"""Sweeps that make their caches and labels, and that train with a teacher in the loop."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.cli import run
from sweep_files import TRAIN, in_process

from dtcache.store.label_sets import label_set_names
from dtcache.store.manifest import read_manifest
from pipelines.sweep import sweep as stage


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, no_fsync: None) -> None:
    """Do jobs in this process, which has torch loaded."""
    monkeypatch.setattr(stage, "start_workers", in_process)


def file_of(images: Path, teacher: Path) -> str:
    """Return a sweep of a label arm on its own cache, an online arm and its random start."""
    return f"""
seeds = [5]
{TRAIN.replace("epochs = 2", "epochs = 1").replace("warmup_epochs = 1", "warmup_epochs = 0")}
limit = 24
[[cache]]
name = "made"
per_seed = true
[cache.extract]
images = "{images}"
teacher = "{teacher}"
timestep = 150
taps = "8"
limit = 24
batch_size = 8
quality = "fp16"
device = "cpu"
precision = "fp32"
[cache.label.fit]
masks = "{images.parent / "masks"}"
width = 32
epochs = 1
warmup_epochs = 0
device = "cpu"
[cache.label.write]
name = "parts"
share = 1.0
device = "cpu"
[[arm]]
name = "online"
images = "{images}"
[arm.train]
teacher = "{teacher}"
timestep = 150
taps = "8"
[[arm]]
name = "labels"
cache = "made"
[arm.train]
labels = "parts"
[[arm]]
name = "random"
start = "random"
[arm.train]
taps = "8"
[evaluate.parts]
task = "segmentation"
arms = ["labels"]
head = "run"
train = "{images}"
train_masks = "{images.parent / "masks"}"
limit_train = 8
limit_test = 8
epochs = 1
device = "cpu"
precision = "fp32"
"""


def test_caches_labels_and_online_arms(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """A cache and its labels are made with the seed of the students, and then trained on."""
    path = tmp_path / "s.toml"
    path.write_text(file_of(scene_folder, teacher_dir))
    out = tmp_path / "out"
    result = run("sweep", path, "--out", out)
    logs = "\n".join(log.read_text() for log in (out / "logs").rglob("*.log"))
    assert result.exit_code == 0, result.output + logs
    cache = out / "caches/made/seed-5"
    assert read_manifest(cache).recipe["seed"] == 5
    assert label_set_names(cache) == ["parts"]
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert {row["arm"] for row in rows} == {"online", "labels", "random"}
    assert {row["arm"] for row in rows if row["metric"] == "label"} == {"labels"}
    assert [row["arm"] for row in rows if row["metric"] == "miou"] == ["labels"]
    assert (out / "runs/labels/seed-5/head").is_dir()
    weights = "model.safetensors"
    start = (out / "runs/random/seed-5/backbone" / weights).read_bytes()
    assert start == (out / "runs/online/seed-5/init" / weights).read_bytes()
    options = json.loads((out / "runs/online/seed-5/run.json").read_text())
    assert options["teacher"] == str(teacher_dir)


def test_a_failed_cache_stops_only_its_arms(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Arms on a cache that cannot be made are not started; the other arms finish."""
    path = tmp_path / "s.toml"
    text = file_of(scene_folder, teacher_dir).replace('taps = "8"\nlimit', 'taps = "64"\nlimit')
    path.write_text(text)
    result = run("sweep", path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "failed: caches/made/seed-5: " in result.output
    assert "not started: runs/labels/seed-5: needs caches/made/seed-5, which failed" in (
        result.output
    )
    assert "2 of 3 students are finished" in " ".join(result.output.split())


def test_a_label_set_that_is_missing_is_refused(scene_cache: Path, tmp_path: Path) -> None:
    """An arm on labels that a sealed cache does not have is refused before anything runs."""
    path = tmp_path / "s.toml"
    path.write_text(f"""
seeds = [0]
[[cache]]
name = "c"
path = "{scene_cache}"
[[arm]]
name = "a"
cache = "c"
[arm.train]
labels = "parts"
""")
    result = run("sweep", path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no label set 'parts'; it has none" in result.output
    assert not (tmp_path / "out").exists()
