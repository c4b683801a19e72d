"""dtcache: cache a diffusion teacher's features once, train any number of students from them."""

from pathlib import Path
from typing import TYPE_CHECKING

from dtcache._version import __version__

if TYPE_CHECKING:
    from dtcache.cache.cache import Cache

__all__ = ["__version__", "open"]


def open(path: str | Path, images: str | Path | None = None) -> "Cache":
    """Open a sealed cache for reading, with the source of its images where it stores none.

    Raises CacheNotFoundError, CacheIncompleteError or CacheDamagedError, and ImagesError for another source. Only here
    are the libraries loaded that reading takes.
    """
    from dtcache.cache.cache import Cache

    return Cache(Path(path), Path(images) if images is not None else None)
