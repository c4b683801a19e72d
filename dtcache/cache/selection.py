"""Which samples and arrays of a cache a training uses: taps and timesteps, and the samples that are held out."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dtcache.cache.cache import Cache
from dtcache.errors import ConfigError
from dtcache.hashing import sha256_json
from dtcache.options import parse_taps
from dtcache.recipe import Json, tap_name
from dtcache.store.layout import SAMPLES


def cache_identity(cache: Cache) -> Json:
    """Return what tells the data of a run: the fingerprint of the recipe, and a hash of the samples."""
    manifest = cache.reader.manifest
    # Of a cache that is not sealed what is committed may be more at a resume, in another order then.
    samples = (
        manifest.files[SAMPLES]
        if manifest.state == "sealed"
        else sha256_json(cache.reader.usable_rows.tolist())
    )
    return {"cache": manifest.fingerprint, "samples": samples}


def chosen_taps(cache: Cache, *, timestep: int | None, taps: str | None) -> list[str]:
    """Return the arrays that --taps and --timestep ask for. Raises ConfigError naming what the cache has."""
    teacher = cache.reader.manifest.recipe["teacher"]
    timesteps = teacher["timesteps"]
    stored = [tap["name"] for tap in teacher["taps"]]
    wanted_t = [timestep] if timestep is not None else timesteps
    wanted_taps = list(parse_taps(taps)) if taps else stored
    for flag, wanted, have in (
        ("--timestep", wanted_t, timesteps),
        ("--taps", wanted_taps, stored),
    ):
        missing = [w for w in wanted if w not in have]
        if missing:
            raise ConfigError(
                f"{flag} {missing[0]}: the cache has {', '.join(map(str, have))}; choose among these"
            )
    return [
        tap_name(t, tap) for t in timesteps if t in wanted_t for tap in stored if tap in wanted_taps
    ]


def split_rows(
    rows: NDArray[np.int64], keys: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to train on and the rows held out, by hash of their keys.

    Raises ConfigError where there are too few for both.
    """
    if len(rows) < 4:
        raise ConfigError(
            f"expected at least 4 usable samples, some of them to be held out, got {len(rows)}"
        )
    held = np.zeros(len(rows), bool)
    held[held_out(keys)] = True
    return rows[~held], rows[held]


def held_out(keys: Sequence[str]) -> list[int]:
    """Return the places of the held-out samples: one per cent, at least 64 (but at most half), by hash of the key.

    A key's membership hangs on the set of keys only, never on their order. The hash is SHA-256 of the canonical JSON of
    ["held-out", key], spelled out: a million keys take a second.
    """
    count = min(max(64, len(keys) // 100), len(keys) // 2)
    if not count:
        return []
    quoted = json.encoder.encode_basestring
    digests = [hashlib.sha256(b'["held-out",%b]' % quoted(key).encode()).digest() for key in keys]
    heads = np.frombuffer(b"".join(digests), ">u8")[::4].astype(np.uint64)
    # The head of the last one that is in; whole digests decide among those few.
    last = np.partition(heads, count - 1)[count - 1]
    within = np.flatnonzero(heads <= last).tolist()
    return sorted(sorted(within, key=lambda place: digests[place])[:count])
