"""How much of a cache the statistics decode at a time, so that `--stats` takes under 1 GB.

The shape of a map comes from the cache, whose author may have chosen it to exhaust the memory: a
payload of a few bytes may stand for a map of 2^26 values.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from dtcache.cache.cache import Cache
from dtcache.errors import ConfigError
from dtcache.store.manifest import read_manifest
from pipelines.inspect.statistics.decode import AT_ONCE

GROUPS = 20
"""Most groups of samples; the jackknife leaves out one at a time."""
MEMORY = 576 << 20
"""Bytes for covariances and decoded maps."""
MAX_VALUES = 1 << 26
"""Most values of all maps of a view. An open cache takes two bytes for each."""
POOLED_MEMORY = 64 << 20
"""Bytes for pooled features of all arrays."""
BYTES_PER_VALUE = 20
"""Bytes per value of a view while it is decoded: its coefficients, its map, and copies of both."""
CODEC_BYTES_PER_VALUE = 24
"""Bytes per value of a map that its decoder takes, however many views it decodes."""
KEPT_BYTES_PER_VALUE = 6
"""Bytes per value of a view that was decoded: its coefficients and its map."""
LEAST_GROUPS = 2
COVARIANCES = 4
"""Copies of a covariance matrix beside those of the groups, at most."""


def require_few_values(root: Path) -> None:
    """Raise ConfigError if a cache has too many values to be opened for statistics."""
    teacher = read_manifest(root).recipe["teacher"]
    per_timestep = sum(tap["channels"] * tap["height"] * tap["width"] for tap in teacher["taps"])
    values = per_timestep * len(teacher["timesteps"])
    if values > MAX_VALUES:
        raise ConfigError(
            f"{root}: its maps have {values} values per view; expected at most {MAX_VALUES} for "
            "statistics; leave `stats` and `report` out"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of the statistics of one cache."""

    groups: int
    """Groups that the sampled rows are divided into."""
    pooled_rows: int
    """Rows per group whose pooled features are kept."""
    left_out: dict[str, str]
    """By array that is too large: the reason."""

    @classmethod
    def of(cls, cache: Cache) -> Self:
        """Return the limits that keep the memory of a cache's statistics under 1 GB."""
        left_out = {
            name: (
                f"statistics of maps {'x'.join(map(str, cache.shape(name)))} of "
                f"{cache.reader.manifest.num_views} views would take "
                f"{_bytes(cache, name, LEAST_GROUPS) / 1e9:.1f} GB; expected at most "
                f"{MEMORY / 1e9:.1f} GB"
            )
            for name in cache.names
            if _bytes(cache, name, LEAST_GROUPS) > MEMORY
        }
        kept = [name for name in cache.names if name not in left_out]
        groups = GROUPS
        while groups > LEAST_GROUPS and any(_bytes(cache, n, groups) > MEMORY for n in kept):
            groups -= 1
        channels = sum(cache.shape(name)[0] for name in kept)
        pooled_rows = POOLED_MEMORY // (4 * groups * max(1, channels))
        return cls(groups=groups, pooled_rows=pooled_rows, left_out=left_out)

    def threads(self, cache: Cache, name: str) -> int:
        """Return how many groups may be decoded at the same time."""
        room = MEMORY - _matrix_bytes(cache, name) * (self.groups + COVARIANCES)
        return max(1, min(os.cpu_count() or 1, room // _row_bytes(cache, name)))


def rows_at_once(cache: Cache) -> int:
    """Return how many rows of all arrays fit into `MEMORY` when they are decoded; it may be 0."""
    values = [int(np.prod(cache.shape(name), dtype=np.int64)) for name in cache.names]
    per_view = KEPT_BYTES_PER_VALUE * sum(values) + BYTES_PER_VALUE * max(values)
    return MEMORY // (cache.reader.manifest.num_views * per_view)


def _bytes(cache: Cache, name: str, groups: int) -> int:
    """Return the bytes of the statistics of one array, decoded by one thread."""
    return _row_bytes(cache, name) + _matrix_bytes(cache, name) * (groups + COVARIANCES)


def _matrix_bytes(cache: Cache, name: str) -> int:
    return 8 * cache.shape(name)[0] ** 2


def _row_bytes(cache: Cache, name: str) -> int:
    """Return the bytes that a thread takes for all views of a row, or of `AT_ONCE` values."""
    values = int(np.prod(cache.shape(name), dtype=np.int64))
    decoded = max(AT_ONCE, values * cache.reader.manifest.num_views) * BYTES_PER_VALUE
    return decoded + values * CODEC_BYTES_PER_VALUE + 3 * _matrix_bytes(cache, name)
