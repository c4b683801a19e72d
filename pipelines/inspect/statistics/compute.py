"""Statistics of every tap and timestep of a cache, of a sample or of all of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dtcache.cache.cache import Cache
from dtcache.errors import ConfigError
from dtcache.hashing import sha256_json
from dtcache.options import InspectOptions
from dtcache.recipe import Json, tap_name
from dtcache.rng import permuted
from pipelines.inspect.statistics import measures
from pipelines.inspect.statistics.decode import Rows
from pipelines.inspect.statistics.disk_cache import keep, load_kept
from pipelines.inspect.statistics.jackknife import Estimate, jackknife
from pipelines.inspect.statistics.similarity import knn_accuracy, similarities
from pipelines.inspect.statistics.sums import (
    EDGES,
    Group,
    GroupSums,
    add,
    empty,
    group_sums,
    rings_of,
    water_lines,
)
from pipelines.terminal.progress import track

GROUPS = 20
"""Groups of samples that the jackknife leaves out one by one."""
STATISTICS_SCHEMA = 1
BY_SUMS = {
    "mean": measures.mean,
    "std": measures.std,
    "saturation": measures.saturation,
    "escapes": measures.escapes,
    "dead_channels": measures.dead_channels,
    "effective_rank": measures.effective_rank,
}


def cache_statistics(root: Path, options: InspectOptions) -> Json:
    """Return the statistics of a cache as JSON values (docs/inspect.md); what is damaged is left out and named.

    They are kept in the user's cache folder under the manifest's hash. Raises ConfigError where no sample is there yet,
    and what opening the cache raises.
    """
    cache = Cache(root, allow="damage")
    rows = chosen_rows(cache, options)
    identity = cache.reader.manifest.identity
    # An unfinished cache gains rows under one manifest, a damaged one loses some.
    asked = {
        "schema": STATISTICS_SCHEMA,
        "rows": len(rows),
        "usable": sha256_json(cache.reader.usable_rows.tolist()),
    }
    found = load_kept(identity, asked)
    if found is None:
        found = _take(cache, rows, sha256_json([identity, asked]))
        if not found["left_out"]:
            keep(identity, asked, found)
    damaged = {f"{root / path}": what for path, what in cache.reader.damaged.items()}
    return {**found, "left_out": damaged | found["left_out"]}


def chosen_rows(cache: Cache, options: InspectOptions) -> Rows:
    """Return the rows that statistics are taken of, in random order: a pure function of what is there."""
    usable = cache.reader.usable_rows
    if not len(usable):
        raise ConfigError(
            f"{cache.reader.root}: no sample with features is there yet; statistics need one"
        )
    count = len(usable) if options.exact else min(options.samples, len(usable))
    return usable[permuted(len(usable), seed=0, stream="inspect")[:count]]


def _take(cache: Cache, rows: Rows, identity: str) -> Json:
    usable = len(cache.reader.usable_rows)
    sampled = len(rows) / usable
    groups = [np.sort(part) for part in np.array_split(rows, min(GROUPS, len(rows)))]
    found: dict[str, list[Group]] = {}
    left_out: dict[str, str] = {}
    taps = []
    recipe = cache.reader.manifest.recipe
    with track("statistics", len(cache.names)) as progress:
        for timestep in recipe["teacher"]["timesteps"]:
            for tap in recipe["teacher"]["taps"]:
                name = tap_name(timestep, tap["name"])
                nothing = empty(cache, name)
                read = group_sums(cache, name, groups, identity)
                for group in read:
                    left_out |= {f"{name} of {key}": what for key, what in group.damaged.items()}
                taps.append(
                    {"name": tap["name"], "timestep": timestep, **_tap(cache, name, read, sampled)}
                )
                # Only what is needed between taps stays: covariances may be large.
                found[name] = [
                    Group(sums=nothing, pooled_rows=g.pooled_rows, pooled_RC=g.pooled_RC)
                    for g in read
                ]
                progress.advance(1, name)
    chance = next((tap.pop("chance") for tap in taps if tap["chance"] is not None), None)
    for tap in taps:
        tap.pop("chance", None)
    return {
        "schema": STATISTICS_SCHEMA,
        "num_rows": len(rows),
        "num_usable": usable,
        "exact": len(rows) == usable,
        "left_out": left_out,
        "histogram_edges": EDGES.tolist(),
        "knn_chance": chance,
        "taps": taps,
        "cka": similarities(found, sampled),
    }


def _tap(cache: Cache, name: str, groups: Sequence[Group], sampled: float) -> Json:
    """Return what is known of one array; estimates are None where they cannot be had."""
    parts = [group.sums for group in groups if group.sums.rows]
    manifest = cache.reader.manifest
    measured = manifest.recipe.get("equivariance") or {}
    sums = manifest.sums.get(name)
    estimates: dict[str, Estimate | None] = dict.fromkeys(BY_SUMS)
    if parts:
        estimates = {
            key: jackknife(parts, statistic, sampled) for key, statistic in BY_SUMS.items()
        }
    draws = jackknife(parts, measures.noise_share, sampled) if parts else None
    recorded = Estimate(
        value=float(manifest.recipe["codec"]["noise_share"][name]), low=None, high=None
    )
    knn, chance = knn_accuracy(groups, cache.samples["label"])
    error = sums.squared_error / sums.energy if sums is not None and sums.energy > 0 else None
    return {
        **{key: _json(estimate) for key, estimate in estimates.items()},
        "noise_share": _json(draws or recorded),
        "noise_share_from": "draws" if draws else "fit",
        "codec_error": _json(
            Estimate(value=error, low=None, high=None) if error is not None else None
        ),
        "flip_error": (measured.get("flip") or {}).get(name),
        "crop_error": (measured.get("crop") or {}).get(name),
        "knn_top1": _json(knn),
        "chance": chance,
        "histogram": add(parts).histogram.tolist() if parts else [],
        "spectrum": _spectrum(cache, name, parts),
    }


def _spectrum(cache: Cache, name: str, parts: Sequence[GroupSums]) -> Json | None:
    """Return mean variance a coefficient by ring of frequency and by principal component, with the water lines."""
    if not parts:
        return None
    whole = add(list(parts))
    channels, height, width = cache.shape(name)
    count = (
        np.bincount(rings_of(height, width).ravel(), minlength=len(whole.rings))
        * channels
        * whole.maps
    )
    components = np.linalg.eigvalsh(measures.covariance(whole))[::-1].clip(0)
    rings, by_component, level = water_lines(cache, name)
    return {
        "rings": (whole.rings / np.maximum(count, 1)).tolist(),
        "components": components.tolist(),
        "water_rings": rings,
        "water_components": by_component,
        "water": level,
    }


def _json(estimate: Estimate | None) -> Json | None:
    return estimate.to_json() if estimate is not None else None
