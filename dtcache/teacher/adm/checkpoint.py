"""Reading a PyTorch checkpoint: every byte is checked, and only plain tensors are unpickled."""

import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dtcache.errors import TeacherError, TeacherNotFoundError, one_line

ZIP_START = b"PK\x03\x04"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by name; they are memory-mapped if the file's format allows it.

    Raises TeacherNotFoundError if there is no such file or it has another format, and TeacherError
    unless the file is a complete checkpoint with nothing but floating-point tensors.
    """
    if path.is_dir():
        raise TeacherNotFoundError(
            f"checkpoint {path}: expected a PyTorch .pt file, got a directory; a directory of "
            "diffusers needs no conversion, pass it as the teacher"
        )
    if path.suffix == ".safetensors":
        raise TeacherNotFoundError(
            f"checkpoint {path}: expected a PyTorch .pt file of OpenAI, got safetensors; convert a "
            "Stable Diffusion checkpoint with diffusers "
            "(StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR))"
        )
    if not path.is_file():
        raise TeacherNotFoundError(f"checkpoint {path}: no such file; expected a PyTorch .pt file")
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_archive(path)
    elif _start(path) == ZIP_START:
        raise TeacherError(
            f"{path}: the end of the file is missing ({path.stat().st_size} bytes); download it "
            "again"
        )
    try:
        # Files of torch before 1.6 are not zip archives and cannot be memory-mapped. torch warns
        # about unexpected pickles before it fails.
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises many types for the bytes of other formats
        raise TeacherError(
            f"{path}: expected a complete PyTorch checkpoint of plain tensors, the only content "
            f"that dtcache unpickles ({one_line(error, 160)}); download it again, or save only the "
            "network's state_dict()"
        ) from error
    if not isinstance(content, Mapping) or not content:
        raise TeacherError(
            f"{path}: expected a state dict of tensors by name, got {_kind(content)}"
        )
    for name, value in content.items():
        if (
            not isinstance(name, str)
            or not isinstance(value, Tensor)
            or not value.is_floating_point()
        ):
            raise TeacherError(
                f"{path}: expected only floating-point tensors by name, got {_kind(value)} at "
                f"{name!r}; save only the network's state_dict()"
            )
    return dict(content)


def _check_archive(path: Path) -> None:
    """Compare the CRC-32 of every record with its bytes, which torch does not do.

    Raises TeacherError if a record is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        damaged = str(error)
    if damaged is not None:
        raise TeacherError(f"{path}: damaged at {damaged}; download it again")


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(ZIP_START))


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return (
        f"an empty {type(value).__name__}"
        if isinstance(value, Mapping) and not value
        else type(value).__name__
    )
