"""Static probability tables for the entropy coder, one per variance class."""

import numpy as np
from numpy.typing import NDArray

from dtcache.codec.rans import MAX_HALF_WIDTH, TABLE_SIZE

DEAD_RATIO = 2.0**-2.25
"""Bands with a standard deviation below this many steps are dropped: they are almost always 0."""
LOWEST = -4
HIGHEST = 16
PRIOR_COUNT = 64.0
"""Weight of the Laplace prior in a table, in observations.

The prior bounds the cost of rare symbols and of small fits.
"""


def variance_class(ratio: NDArray[np.float64], dead: float = DEAD_RATIO) -> NDArray[np.int64]:
    """Return the variance class of each band, 0..20 in half octaves of std / step, or -1 if dead.

    A band is dead if the ratio is below `dead`.
    """
    octaves = np.rint(2 * np.log2(np.maximum(ratio, 1e-9)))
    return np.where(ratio < dead, -1, np.clip(octaves, LOWEST, HIGHEST) - LOWEST).astype(np.int64)


def fit_tables(
    kinds: NDArray[np.int64], values: list[NDArray[np.int16]]
) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Return frequencies (T, A) and half widths (T,), fitted to the values of each class.

    Each row of the frequencies sums to 2048. `kinds` (T,) are the variance classes; `values` are
    the quantised coefficients of each class.
    """
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
    floor = np.floor(exact)
    short = TABLE_SIZE - len(counts) - int(floor.sum())
    floor[np.argsort(floor - exact, kind="stable")[:short]] += 1
    frequencies: NDArray[np.uint16] = (floor + 1).astype(np.uint16)
    return frequencies
