"""The free space of the disk that a cache is written to."""

import shutil
from pathlib import Path

from dtcache.errors import DiskError
from pipelines.terminal.text import byte_size

RESERVE = 1.05
"""Required free bytes per estimated byte: file systems and indices take some more."""


def require_space(out: Path, needed: float) -> None:
    """Raise DiskError if the disk of `out` has fewer than `needed` bytes free, plus a reserve."""
    free = free_bytes(out)
    if free < RESERVE * needed:
        raise DiskError(
            f"{out}: expected {byte_size(RESERVE * needed)} free for this cache, found "
            f"{byte_size(free)}; free some space, pass another `out` or a smaller `quality`, or "
            "skip this check with `skip_disk_check=True`"
        )


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk of `path`, which need not exist."""
    folders = (path.absolute(), *path.absolute().parents)
    return shutil.disk_usage(next(folder for folder in folders if folder.exists())).free
