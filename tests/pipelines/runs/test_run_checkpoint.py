"""Checkpoints that somebody else wrote: bounded by the size of the file, checked, never run."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dtcache.errors import CacheDamagedError
from pipelines.runs.checkpoint import (
    load_checkpoint,
    require_clock,
    require_number,
    save_checkpoint,
)
from pipelines.runs.folder import CHECKPOINT

pytestmark = pytest.mark.usefixtures("no_fsync")


def compressed(path: Path) -> None:
    """Write zeros that take a thousand times the bytes of the file."""
    whole = path.with_name("whole")
    torch.save({"step": 1, "x": torch.zeros(1 << 20)}, whole)
    with zipfile.ZipFile(whole) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))


def code(path: Path) -> None:
    """Write a pickle that would create a file if it was run."""

    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (path.with_name("executed"),)

    torch.save({"step": 1, "x": Hostile()}, path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (compressed, "it has compressed entries, which torch does not write"),
        (code, "Weights only load failed"),
        (lambda path: path.mkdir(), "it is not a regular file"),
        (lambda path: path.write_bytes(pickle.dumps({"step": 1})), "File is not a zip file"),
        (lambda path: torch.save([1], path), "list indices must be integers"),
        (lambda path: torch.save({}, path), "'step'"),
        (
            lambda path: torch.save({"step": -1}, path),
            "step is '-1', not a number from 0 to 1e+300",
        ),
        (lambda path: torch.save({"step": 1.5}, path), "step is '1.5'"),
        (lambda path: torch.save({"step": True}, path), "step is 'True'"),
    ],
)
def test_a_hostile_checkpoint_is_refused(damage: Any, reason: str, tmp_path: Path) -> None:
    """A file that is no checkpoint is refused in one line that says why; no code in it runs."""
    damage(tmp_path / CHECKPOINT)
    with pytest.raises(CacheDamagedError, match="not a readable checkpoint") as raised:
        load_checkpoint(tmp_path)
    assert reason in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "executed").exists()


def test_a_saved_checkpoint_is_read_again(tmp_path: Path) -> None:
    """What is saved is loaded, without a checkpoint there is none."""
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, {"step": 3, "x": torch.arange(4)})
    state = load_checkpoint(tmp_path)
    assert state is not None and state["step"] == 3 and state["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", None, True, 11])
def test_a_number_is_finite_and_within_its_bounds(value: object) -> None:
    """A negative, non-finite, mistyped or too large entry is refused by name."""
    require_number("images", 10, most=10)
    with pytest.raises(ValueError, match=r"^images is "):
        require_number("images", value, most=10)
    with pytest.raises(ValueError, match=re.escape("the clock's waited is ")):
        require_clock({"seconds": 1.0, "waited": value if value != 11 else -1, "images": 3})
