"""What tests of stages share: a tiny cache, a copy of it to be damaged, a cache with labels, a place for statistics."""

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from store.builders import tiny_plan, write_cache

from cli import main


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Spare the disk, as no test here pulls the plug, and keep statistics in a folder of the test's own."""
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


@pytest.fixture(scope="session")
def interpreter(
    scene_folder: Path, scene_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An interpreter of the scenes' pixels, barely fitted."""
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
    """The cache of the scenes with a label set, parts; copy it before anything is written to it."""
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
