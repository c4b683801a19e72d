"""dtcache: cache a diffusion teacher's features once, train any number of students from them."""

from pathlib import Path
from typing import TYPE_CHECKING

from dtcache._version import __version__

if TYPE_CHECKING:
    from dtcache.cache.cache import Cache

__all__ = ["__version__", "open"]


def open(path: str | Path, images: str | Path | None = None) -> "Cache":
    """Open a sealed cache for reading.

    `images` is the source that the cache was extracted from; it is needed for the images of a cache
    that does not store them.

    Raises CacheNotFoundError, CacheIncompleteError or CacheDamagedError, and ImagesError if
    `images` is a different source. torch and the other libraries that reading needs are imported by
    this call, not by `import dtcache`.
    """
    from dtcache.cache.cache import Cache

    return Cache(Path(path), Path(images) if images is not None else None)
