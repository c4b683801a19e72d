"""A run's checkpoint, which a resumed run continues from."""

import io
import pickle
from collections.abc import Iterator
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
    runs. Raises CacheDamagedError if it cannot be read.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CacheDamagedError(
            f"{path}: not a readable checkpoint ({one_line(error, 200)}); "
            "delete the file to start the run again from step 0"
        ) from error
    return state


@contextmanager
def checkpoint_errors(out: Path) -> Iterator[None]:
    """Raise CacheDamagedError if the block finds that the run's checkpoint does not fit."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CacheDamagedError(
            f"{out / CHECKPOINT}: does not fit the network and optimizer ({one_line(error, 200)}). "
            "Another version of dtcache or timm wrote it; finish the run with that version, or "
            "delete the file to start the run again from step 0"
        ) from error
