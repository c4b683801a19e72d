"""Fixtures of the pipelines' tests: an interpreter, and a cache with a label set."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.s3 import Bucket, environment, new_bucket, upload

from cli import main


@pytest.fixture(scope="session")
def interpreter(
    scene_folder: Path, scene_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An interpreter of the scenes, trained for very few steps."""
    out = tmp_path_factory.mktemp("fit") / "interpreter"
    masks = scene_folder.parent / "masks"
    flags = [
        "--width",
        "32",
        "--epochs",
        "2",
        "--warmup-epochs",
        "1",
        "--device",
        "cpu",
        "--limit",
        "12",
    ]
    command = ["label", "fit", str(scene_cache), "--masks", str(masks), "--out", str(out), *flags]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def labelled(
    scene_folder: Path,
    scene_cache: Path,
    interpreter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The scenes' cache with a label set named `parts`; copy the cache before writing to it."""
    root = tmp_path_factory.mktemp("labelled") / "cache"
    masks = scene_folder.parent / "masks"
    shutil.copytree(scene_cache, root)
    command = [
        "label",
        "write",
        str(root),
        str(interpreter),
        "--name",
        "parts",
        "--masks",
        str(masks),
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "soft labels of 40 images" in result.output
    assert "over the requested share of 0.1; in a cache of few images, the files" in result.output
    return root


@pytest.fixture
def bucket(s3: str, scene_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    """The cache of 40 scenes in a bucket; local copies are in the test's own folder."""
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)
    store = Bucket(f"s3://{new_bucket(s3)}/scenes.cache")
    upload(scene_cache, store)
    monkeypatch.setenv("DTCACHE_LOCAL_CACHE", str(tmp_path / "copies"))
    return store
