"""Small shared inputs: scenes as PNG files, a saved teacher, caches."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from store.builders import tiny_plan, write_cache
from support.extraction import quick_extraction
from support.s3 import s3_server

from dtcache.teacher.ddpm import build_unet, save_teacher
from pipelines.extract.extract import extract
from pipelines.write_scenes import write_scenes

# Threads slow tiny tensors on a busy machine; subprocesses inherit the variable.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need ../shared/data if that folder does not exist."""
    if not SHARED.is_dir():
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(pytest.mark.skip(reason="../shared/data is not here"))


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, for tests that simulate no power cut."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3 server on this machine."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    with s3_server() as address:
        yield address


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images."""
    return SHARED


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder tree of 40 scenes of 32 px in class folders."""
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, seed=7, size=32, count=40)
    return root / "images"


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 32 px U-Net of four levels in diffusers' sub-folder layout."""
    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("teacher")
    save_teacher(build_unet(32, 32, (16, 16, 32, 32), layers=1, attention=1), root, torch.float32)
    return root


@pytest.fixture(scope="session")
def scene_cache(
    scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache of the 40 scenes: both flips, two taps, three shards; copy before writing to it."""
    options = quick_extraction(teacher_dir, shard_rows=16, bytes_per_image=4608)
    out = tmp_path_factory.mktemp("scene-cache") / "cache"
    extract(scene_folder, out, options)
    return out


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Skip fsync, since no test cuts the power, and save statistics in the test's own folder."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sealed cache that no test changes."""
    return write_cache(tmp_path_factory.mktemp("tiny") / "cache", tiny_plan())


@pytest.fixture
def tiny_copy(tiny_cache: Path, tmp_path: Path) -> Path:
    """A copy of the tiny cache, to be damaged."""
    return Path(shutil.copytree(tiny_cache, tmp_path / "cache"))
