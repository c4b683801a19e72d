"""The samples and arrays of a cache that a training uses: taps, timesteps, held-out samples."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from dtcache.cache.cache import Cache
from dtcache.errors import ConfigError
from dtcache.options import parse_taps
from dtcache.recipe import tap_name
from dtcache.row_set import RowSet

MOST_HELD_OUT = 50_000
"""Held-out samples of five million samples or more."""


def chosen_taps(cache: Cache, *, timestep: int | None, taps: str | None) -> list[str]:
    """Return the names of the arrays of `taps` at `timestep`; None selects all.

    `taps` are names or strides, separated by commas. Raises ConfigError, listing the cached values,
    if one is missing.
    """
    teacher = cache.reader.manifest.recipe["teacher"]
    timesteps = teacher["timesteps"]
    stored = [tap["name"] for tap in teacher["taps"]]
    wanted_t = [timestep] if timestep is not None else timesteps
    wanted_taps = list(parse_taps(taps)) if taps else stored
    for field, wanted, cached in (
        ("timestep", wanted_t, timesteps),
        ("taps", wanted_taps, stored),
    ):
        missing = [value for value in wanted if value not in cached]
        if missing:
            raise ConfigError(
                f"`{field}` {missing[0]}: the cache has {', '.join(map(str, cached))}; pass one of "
                "these"
            )
    return [
        tap_name(t, tap) for t in timesteps if t in wanted_t for tap in stored if tap in wanted_taps
    ]


def split_rows(rows: RowSet, keys: Sequence[str]) -> tuple[RowSet, RowSet]:
    """Return the rows to train on and the held-out rows, of which `keys` are the keys.

    One row in a hundred is held out, at least 64 and at most half. The choice is a hash of each
    key, so that it does not depend on the order of the rows. Of five million rows or more, the last
    MOST_HELD_OUT are held out instead, and no key is read: the rows of a cache are in random order.
    Raises ConfigError if there are fewer than 4 rows.
    """
    if len(rows) < 4:
        raise ConfigError(
            f"expected at least 4 usable samples, some of which are held out, got {len(rows)}; "
            "cache more"
        )
    if num_held_out(len(rows)) == MOST_HELD_OUT:
        return rows[:-MOST_HELD_OUT], rows[-MOST_HELD_OUT:]
    held = np.zeros(len(rows), bool)
    held[held_out(keys)] = True
    every = rows.array()
    return RowSet.of(every[~held]), RowSet.of(every[held])


def num_held_out(samples: int) -> int:
    """Return the number of held-out samples: one per cent, at least 64, at most half.

    It is never more than MOST_HELD_OUT.
    """
    return min(max(64, samples // 100), samples // 2, MOST_HELD_OUT)


def held_out(keys: Sequence[str]) -> list[int]:
    """Return the indices of the held-out keys, by a hash of each key.

    Which keys are held out depends on the set of keys alone, not on their order. The hash is
    SHA-256 of the canonical JSON of ["held-out", key], built by hand: a million keys take a second.
    """
    count = num_held_out(len(keys))
    if not count:
        return []
    heads = np.fromiter(
        (int.from_bytes(_held_out_hash(key)[:8], "big") for key in keys), np.uint64, len(keys)
    )
    # The first 8 bytes of the last held-out digest. If heads are equal, whole digests decide.
    last = np.partition(heads, count - 1)[count - 1]
    candidates = np.flatnonzero(heads <= last).tolist()
    if len(candidates) == count:
        return list(candidates)
    return sorted(
        sorted(candidates, key=lambda index: (heads[index], _held_out_hash(keys[index])))[:count]
    )


def _held_out_hash(key: str) -> bytes:
    quoted = json.encoder.encode_basestring(key)
    return hashlib.sha256(b'["held-out",%b]' % quoted.encode()).digest()
