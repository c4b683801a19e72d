"""Static probability tables, one a class of variance."""

import numpy as np
from numpy.typing import NDArray

from dtcache.codec.tap_codec import MAX_HALF_WIDTH, TABLE_SIZE

DEAD_RATIO = 2.0**-2.25
"""Bands whose standard deviation is under this many steps almost never leave the dead zone: they are dropped."""
LOWEST = -4
HIGHEST = 16
PRIOR_COUNT = 64.0
"""Weight of the Laplace prior in a table, in observations, so that small fits and rare symbols are priced sanely."""


def variance_class(ratio: NDArray[np.float64], dead: float = DEAD_RATIO) -> NDArray[np.int64]:
    """Return the class (0..20, half octaves) of bands by standard deviation over step, or -1 under a dead ratio."""
    octaves = np.rint(2 * np.log2(np.maximum(ratio, 1e-9)))
    return np.where(ratio < dead, -1, np.clip(octaves, LOWEST, HIGHEST) - LOWEST).astype(np.int64)


def fit_tables(
    kinds: NDArray[np.int64], values: list[NDArray[np.int16]]
) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Return frequencies (T, A) that sum to 2048 a row, and half widths (T,), of the values seen in each class."""
    ratios = 2.0 ** ((kinds + LOWEST) / 2)
    half = np.clip(np.ceil(4 * ratios), 2, MAX_HALF_WIDTH).astype(np.int64)
    tables = np.zeros((len(kinds), int(2 * half.max(initial=0) + 2)), np.uint16)
    for t, (h, ratio) in enumerate(zip(half, ratios, strict=True)):
        clipped = np.clip(values[t].astype(np.int64), -h - 1, h + 1)
        counts = np.bincount(clipped + h + 1, minlength=2 * h + 3).astype(np.float64)
        seen = np.append(counts[1:-1], counts[0] + counts[-1])
        prior = np.exp(-np.sqrt(2) * np.abs(np.arange(-h, h + 1)) / max(ratio, 0.5))
        prior = np.append(prior, prior.min())
        tables[t, : 2 * h + 2] = normalise(seen + PRIOR_COUNT * prior / prior.sum())
    return tables, half.astype(np.uint8)


def normalise(counts: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Scale positive counts to integers of at least 1 that sum to 2048, by largest remainder."""
    exact = counts / counts.sum() * (TABLE_SIZE - len(counts))
    whole = np.floor(exact)
    short = TABLE_SIZE - len(counts) - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:short]] += 1
    frequencies: NDArray[np.uint16] = (whole + 1).astype(np.uint16)
    return frequencies
