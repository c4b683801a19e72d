"""A .pt file is read only if it holds nothing but tensors, complete and undamaged."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtcache.errors import TeacherError, TeacherNotFoundError
from dtcache.teacher.adm.checkpoint import read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_give_the_tensors(tmp_path: Path, zipped: bool) -> None:
    """A zip archive and the format of torch before 1.6 give the same tensors."""
    torch.save(WEIGHTS, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    got = read_checkpoint(tmp_path / "x.pt")
    assert list(got) == list(WEIGHTS)
    assert all(
        torch.equal(got[name], WEIGHTS[name]) and got[name].dtype == WEIGHTS[name].dtype
        for name in WEIGHTS
    )


class Evil:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_code_in_the_file_is_never_run(tmp_path: Path, kind: str) -> None:
    """A pickle with code is refused in every container, and its code does not run."""
    content = {"a": torch.ones(1), "b": Evil(tmp_path / "ran")}
    if kind == "pickle":
        (tmp_path / "x.pt").write_bytes(pickle.dumps(content["b"]))
    else:
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(
        TeacherError,
        match=(
            r"expected a complete PyTorch checkpoint of plain tensors, the only content that "
            r"dtcache unpickles"
        ),
    ):
        read_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "expected a state dict of tensors by name, got list"),
        (
            torch.ones(1),
            r"expected a state dict of tensors by name, got a tensor of torch\.float32",
        ),
        ({}, "expected a state dict of tensors by name, got an empty dict"),
        (
            {"state_dict": WEIGHTS},
            "got dict at 'state_dict'; save only the network's state_dict",
        ),
        ({"a": torch.ones(1), "step": 7}, "got int at 'step'"),
        ({"a": torch.ones(1, dtype=torch.int64)}, r"got a tensor of torch\.int64 at 'a'"),
        ({3: torch.ones(1)}, "got a tensor of torch.float32 at 3"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: object, message: str) -> None:
    """An entry that is not a floating-point tensor is refused by name."""
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(TeacherError, match=message):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float, zipped: bool) -> None:
    """A file of either format, cut anywhere, gives one line."""
    torch.save({"a": torch.rand(1000)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(
        TeacherError, match=r"the end of the file is missing|expected a complete PyTorch checkpoint"
    ) as caught:
        read_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    """A damaged record, which torch alone would load as a wrong weight, is refused."""
    torch.save({"a": torch.full((1000,), 2.0)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.index(torch.full((8,), 2.0).numpy().tobytes()) + 400] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    assert not torch.equal(
        torch.load(tmp_path / "x.pt", weights_only=True)["a"], torch.full((1000,), 2.0)
    )
    with pytest.raises(TeacherError, match=r"damaged at .*data/0; download it again"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("data", [b"", b"no checkpoint\n", bytes(5000)])
def test_something_else_is_refused(tmp_path: Path, data: bytes) -> None:
    """A file that is not a checkpoint gives one line."""
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(
        TeacherError, match="expected a complete PyTorch checkpoint of plain tensors"
    ):
        read_checkpoint(tmp_path / "x.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A missing path is refused."""
    with pytest.raises(
        TeacherNotFoundError, match=r"x\.pt: no such file; expected a PyTorch \.pt file"
    ):
        read_checkpoint(tmp_path / "x.pt")


def test_a_directory_or_safetensors_is_no_checkpoint(tmp_path: Path) -> None:
    """The two other forms of published models are named, with what to do with them."""
    with pytest.raises(
        TeacherError, match="got a directory; a directory of diffusers needs no con"
    ):
        read_checkpoint(tmp_path)
    path = tmp_path / "v1-5-pruned.safetensors"
    path.touch()
    with pytest.raises(TeacherError, match=r"got safetensors; convert .*from_single_file\(FILE\)"):
        read_checkpoint(path)
