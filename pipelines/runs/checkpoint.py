"""A run's checkpoint, which a resumed run continues from."""

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dtcache.atomic_files import write_file
from dtcache.errors import CacheDamagedError, one_line
from pipelines.runs.folder import CHECKPOINT


def save_checkpoint(out: Path, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint, atomically and durably. Raises DiskError."""
    sink = io.BytesIO()
    torch.save(state, sink)
    write_file(out / CHECKPOINT, sink.getbuffer())


def load_checkpoint(out: Path) -> dict[str, Any] | None:
    """Return the last checkpoint with its tensors on the CPU, or None if there is none.

    It is read with `weights_only`: the file can hold tensors and plain values, and no code in it
    runs. Its entries take at most as much memory as the file has bytes. It has a `step` of 0 or
    more; the caller checks the other entries. Raises CacheDamagedError if it cannot be read.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        _require_stored(path)
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        require_number("step", state["step"], kind=int)
    except Exception as error:
        # A hostile file can make the restricted unpickler fail with an error of almost any type.
        raise CacheDamagedError(
            f"{path}: not a readable checkpoint ({one_line(error, 200)}); "
            "delete the file to start the run again from step 0"
        ) from error
    return state


def _require_stored(path: Path) -> None:
    """Raise ValueError unless a file is a ZIP archive whose entries are as large as their bytes.

    A compressed entry, and entries that share their bytes, could take far more memory.
    """
    if not path.is_file():
        raise ValueError("it is not a regular file")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it has compressed entries, which torch does not write")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries are larger than the file")


def require_number(name: str, value: Any, *, kind: type = float, most: float = 1e300) -> None:
    """Raise ValueError unless an entry is a finite number from 0 to `most`; `kind` is its type."""
    is_number = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not is_number or not 0 <= value <= most:
        raise ValueError(f"{name} is {str(value)[:40]!r}, not a number from 0 to {most}")


def require_clock(state: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError unless a state is one of a `Clock`."""
    for name in ("seconds", "waited", "images"):
        require_number(f"the clock's {name}", state[name])


@contextmanager
def checkpoint_errors(out: Path) -> Iterator[None]:
    """Raise CacheDamagedError if the block finds that the run's checkpoint does not fit."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CacheDamagedError(
            f"{out / CHECKPOINT}: not a checkpoint of this run: it does not fit the network and "
            f"optimizer ({one_line(error, 200)}). "
            "Another version of dtcache or timm wrote it; finish the run with that version, or "
            "delete the file to start the run again from step 0"
        ) from error
