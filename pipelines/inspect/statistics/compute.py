"""Statistics of every tap and timestep of a cache, from a sample of its rows or from all."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dtcache.cache.cache import Cache
from dtcache.errors import CacheIncompleteError
from dtcache.hashing import sha256_json
from dtcache.options import InspectOptions
from dtcache.recipe import Json, tap_name
from dtcache.rng import permuted
from dtcache.store.remote import Location, folder_of
from pipelines.inspect.statistics import measures
from pipelines.inspect.statistics.decode import Rows
from pipelines.inspect.statistics.disk_cache import read_statistics, save_statistics
from pipelines.inspect.statistics.jackknife import Estimate, jackknife
from pipelines.inspect.statistics.limits import Limits, require_few_values
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

STATISTICS_SCHEMA = 2
"""Version of the statistics; saved ones of another version are computed again."""
FROM_SUMS = {
    "mean": measures.mean,
    "std": measures.std,
    "saturation": measures.saturation,
    "escapes": measures.escapes,
    "dead_channels": measures.dead_channels,
    "effective_rank": measures.effective_rank,
}


def cache_statistics(root: Location, options: InspectOptions) -> Json:
    """Return the statistics of a cache as JSON values (docs/inspect.md), without damaged samples.

    `left_out` names what could not be read. Results without damage are saved in the user's cache
    folder under the hash of the manifest, and read from there the next time. Raises
    CacheIncompleteError if no sample has features yet, ConfigError if a view has too many values,
    and what opening the cache raises.
    """
    require_few_values(folder_of(root))
    cache = Cache(root, allow="damage")
    rows = chosen_rows(cache, options)
    identity = cache.reader.manifest.identity
    # With the same manifest, an unfinished cache gains rows, and a damaged cache loses some.
    request = {
        "schema": STATISTICS_SCHEMA,
        "rows": len(rows),
        "usable": sha256_json(cache.reader.usable_rows.tolist()),
    }
    statistics = read_statistics(identity, request)
    if statistics is None:
        statistics = _compute(cache, rows)
        if not statistics["left_out"]:
            save_statistics(identity, request, statistics)
    damaged = {f"{root}/{path}": reason for path, reason in cache.reader.damaged.items()}
    return {**statistics, "left_out": damaged | statistics["left_out"]}


def chosen_rows(cache: Cache, options: InspectOptions) -> Rows:
    """Return the rows that statistics are computed from, in random order.

    A pure function of the readable rows and the options. Raises CacheIncompleteError if there is
    no row.
    """
    usable = cache.reader.usable_rows
    if not len(usable):
        raise CacheIncompleteError(
            f"{cache.reader.location}: no sample has features yet; statistics need at least one"
        )
    count = len(usable) if options.exact else min(options.num_samples, len(usable))
    return usable[permuted(len(usable), seed=0, stream="inspect")[:count]]


def _compute(cache: Cache, rows: Rows) -> Json:
    """Return the statistics from some rows, decoding one tap after the other."""
    num_usable = len(cache.reader.usable_rows)
    limits = Limits.of(cache)
    row_groups = [np.sort(group) for group in np.array_split(rows, min(limits.groups, len(rows)))]
    pooled: dict[str, list[Group]] = {}
    left_out = dict(limits.left_out)
    taps = []
    knn_chance = None
    recipe = cache.reader.manifest.recipe
    with track("statistics", len(cache.names)) as progress:
        for timestep in recipe["teacher"]["timesteps"]:
            for tap in recipe["teacher"]["taps"]:
                name = tap_name(timestep, tap["name"])
                groups = (
                    [Group(sums=empty((0, 0, 0)))] * len(row_groups)
                    if name in limits.left_out
                    else group_sums(cache, name, row_groups, limits)
                )
                damaged = {key: why for group in groups for key, why in group.damaged.items()}
                left_out |= {f"{name} of {key}": why for key, why in damaged.items()}
                sampled = (len(rows) - len(damaged)) / num_usable
                knn, chance = knn_accuracy(groups, cache.samples["label"])
                if knn_chance is None:
                    knn_chance = chance
                taps.append(
                    {
                        "name": tap["name"],
                        "timestep": timestep,
                        **_tap(cache, name, groups, sampled),
                        "knn_top1": _json(knn),
                        **_distributions(cache, name, groups),
                    }
                )
                # Covariances may be large; later taps need the pooled features only.
                pooled[name] = [replace(g, sums=empty((0, 0, 0))) for g in groups]
                progress.advance(1, name)
    return {
        "schema": STATISTICS_SCHEMA,
        "num_rows": len(rows),
        "num_usable": num_usable,
        "exact": len(rows) == num_usable and not left_out,
        "left_out": left_out,
        "histogram_edges": EDGES.tolist(),
        "knn_chance": knn_chance,
        "taps": taps,
        "cka": similarities(pooled, len(rows) / num_usable),
    }


def _tap(cache: Cache, name: str, groups: Sequence[Group], sampled: float) -> Json:
    """Return the statistics of one array; an estimate is None if it cannot be computed."""
    sums = [group.sums for group in groups if group.sums.rows]
    manifest = cache.reader.manifest
    equivariance = manifest.recipe.get("equivariance") or {}
    estimates: dict[str, Estimate | None] = dict.fromkeys(FROM_SUMS)
    noise_of_draws = None
    if sums:
        estimates = {
            key: jackknife(sums, statistic, sampled) for key, statistic in FROM_SUMS.items()
        }
        noise_of_draws = jackknife(sums, measures.noise_share, sampled)
    noise_of_fit = Estimate(
        value=float(manifest.recipe["codec"]["noise_share"][name]), low=None, high=None
    )
    codec_error = None
    codec_sums = manifest.sums.get(name)
    if codec_sums is not None and codec_sums.energy > 0:
        error = codec_sums.squared_error / codec_sums.energy
        codec_error = Estimate(value=error, low=None, high=None)
    return {
        **{key: _json(estimate) for key, estimate in estimates.items()},
        "noise_share": _json(noise_of_draws or noise_of_fit),
        "noise_share_from": "draws" if noise_of_draws else "fit",
        "codec_error": _json(codec_error),
        "flip_error": (equivariance.get("flip") or {}).get(name),
        "crop_error": (equivariance.get("crop") or {}).get(name),
    }


def _distributions(cache: Cache, name: str, groups: Sequence[Group]) -> Json:
    """Return the histogram of whitened values and the spectrum of one array."""
    sums = [group.sums for group in groups if group.sums.rows]
    if not sums:
        return {"histogram": [], "spectrum": None}
    total = add(sums)
    return {"histogram": total.histogram.tolist(), "spectrum": _spectrum(cache, name, total)}


def _spectrum(cache: Cache, name: str, total: GroupSums) -> Json:
    """Return the mean variance per coefficient, by ring of frequency and by principal component.

    Both come with the codec's water lines (see `water_lines`).
    """
    channels, height, width = cache.shape(name)
    ring_sizes = np.bincount(rings_of(height, width).ravel(), minlength=len(total.rings))
    counts = ring_sizes * channels * total.maps
    components = np.linalg.eigvalsh(measures.covariance(total))[::-1].clip(0)
    water_rings, water_components, water = water_lines(cache, name)
    return {
        "rings": (total.rings / np.maximum(counts, 1)).tolist(),
        "components": components.tolist(),
        "water_rings": water_rings,
        "water_components": water_components,
        "water": water,
    }


def _json(estimate: Estimate | None) -> Json | None:
    return estimate.to_json() if estimate is not None else None
