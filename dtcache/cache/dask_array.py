"""A tap of a whole cache as a lazy dask array."""

import functools
from pathlib import Path

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from dtcache.cache.cache import Cache
from dtcache.errors import CacheMismatchError
from dtcache.store.reader import Allowed

CHUNK_VALUES = 1 << 23
"""Most values of a chunk, 32 MiB of fp32."""


def lazy_stack(cache: Cache, name: str) -> da.Array:
    """Return an array's decoded features, fp32 (N, V, C, H, W); chunks are rows, NaN where a row is not usable."""
    shape = (len(cache), cache.reader.manifest.num_views, *cache.shape(name))
    rows = max(1, CHUNK_VALUES // int(np.prod(shape[1:])))
    chunks = (rows, *shape[1:])
    # Tasks name the cache, so that workers in other processes open it once each.
    root = str(cache.reader.root.resolve())
    identity = cache.reader.manifest.identity
    whole = da.core.normalize_chunks(chunks, shape)
    numbers = da.arange(len(cache), chunks=rows, dtype=np.int64)[:, None, None, None, None]
    stacked: da.Array = da.map_blocks(
        _decoded,
        numbers,
        root=root,
        identity=identity,
        allow=cache.allow,
        tap=name,
        dtype=np.float32,
        chunks=whole,
        meta=np.empty((0,) * 5, np.float32),
        name=f"dtcache-{identity[:16]}-{name}-{rows}",
    )
    return stacked


def _decoded(
    numbers: NDArray[np.int64], root: str, identity: str, allow: Allowed, tap: str
) -> NDArray[np.float32]:
    """Decode the rows of a chunk."""
    cache = _opened(root, identity, allow)
    rows = numbers.reshape(-1)
    good = np.isin(rows, cache.reader.usable_rows)
    shape = cache.reader.manifest.num_views, *cache.shape(tap)
    out = np.full((len(rows), *shape), np.nan, np.float32)
    out[good] = cache.raw(tap, rows[good]).numpy()
    return out


@functools.lru_cache(maxsize=4)
def _opened(root: str, identity: str, allow: Allowed) -> Cache:
    """Open a cache once a process. Raises CacheMismatchError where another one lies in its place by now."""
    cache = Cache(Path(root), allow=allow)
    if cache.reader.manifest.identity != identity:
        raise CacheMismatchError(
            f"{root}: expected the cache that the stack was made of, got another one, or the same one finished since; "
            "open it again and make the stack anew"
        )
    return cache
