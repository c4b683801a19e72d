"""Room on the disk for a cache: what it needs, and what there is."""

import shutil
from pathlib import Path

from dtcache.errors import DiskError
from dtcache.images import load_views
from dtcache.images.stored_images import encode_stored, image_bound
from pipelines.extract.plan import Job
from pipelines.terminal.text import byte_size

SAMPLED_IMAGES = 16
RESERVE = 1.05
"""Shares of the forecast bytes that must be free: file systems and indices take some."""


def image_bytes(job: Job) -> float:
    """Return the mean bytes of a stored image, from a few that can be decoded; 0 where none are stored."""
    if not job.stores_images:
        return 0.0
    places = [job.samples[row].index for row in range(min(SAMPLED_IMAGES, len(job.samples)))]
    loaded = [
        view
        for view in load_views(job.source, places, job.view, threads=1)
        if view.pixels_CHW is not None
    ]
    return sum(len(encode_stored(view, image_bound(job.view))) for view in loaded) / max(
        1, len(loaded)
    )


def require_space(out: Path, needed: float) -> None:
    """Raise DiskError where the disk of `out` has less than `needed` bytes free."""
    free = free_bytes(out)
    if free < RESERVE * needed:
        raise DiskError(
            f"{out}: expected {byte_size(RESERVE * needed)} free for this cache, found {byte_size(free)}; free some "
            "space, choose another --out or a smaller --quality, or go on with --force"
        )


def free_bytes(path: Path) -> int:
    """Return what is free on the disk of a path that need not exist."""
    there = next(
        folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists()
    )
    return shutil.disk_usage(there).free
