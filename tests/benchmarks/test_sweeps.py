"""The sweep files of the repository can be read."""

import os
import shutil
from pathlib import Path

import pytest

from pipelines.sweep.sweep_file import read_sweep

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "benchmarks" / "sweeps").glob("*.toml"))
DATA = (
    "cifar10-train.parquet",
    "cifar10-test.parquet",
    "untrained-cifar10",
    "untrained-scenes",
    *(
        f"{scenes}/{kind}"
        for scenes in ("scenes", "scenes-40", "scenes-test")
        for kind in ("images", "masks")
    ),
)
"""What the README of the sweeps puts into benchmarks/data."""


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_has_valid_options_and_both_controls(path: Path, tmp_path: Path) -> None:
    """Every file is valid, and has a random start and an untrained teacher beside its arms."""
    for name in DATA:
        (tmp_path / "benchmarks" / "data" / name).mkdir(parents=True)
    for scenes in ("scenes", "scenes-test"):
        (tmp_path / "benchmarks" / "data" / scenes / "boxes.json").touch()
    os.symlink(ROOT / "dtcache", tmp_path / "dtcache")
    os.symlink(ROOT / "benchmarks" / "teachers", tmp_path / "benchmarks" / "teachers")
    folder = tmp_path / "benchmarks" / "sweeps"
    folder.mkdir()
    sweep = read_sweep(Path(shutil.copy(path, folder)))
    arms = {arm.name: arm for arm in sweep.arms}
    assert arms["random"].start == "random"
    assert arms["untrained-teacher"].caches == ("untrained",)
    assert "/untrained-" in str(sweep.cache("untrained").extract.teacher)
    assert len(sweep.seeds) >= 5
    for cache in sweep.caches:
        assert Path(cache.extract.teacher).exists(), cache.name
