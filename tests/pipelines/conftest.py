"""What tests of inspect and verify share: a tiny cache, a copy of it to be damaged, a place apart for statistics."""

import os
import shutil
from pathlib import Path

import pytest
from store.builders import tiny_plan, write_cache


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
