"""Random numbers that belong to a sample at a step: counter-based, whoever asks for them and in which order."""

import numpy as np
from numpy.typing import NDArray


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's output for states x (Steele, Lea and Flood 2014): a bijection that mixes every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def sample_uniforms(
    seed: int, step: int, rows: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Return numbers (B, count) in [0, 1): a pure function of (seed, step, row, place), mixed one after the other."""
    key_B = splitmix64(splitmix64(np.full(len(rows), seed, np.uint64)) ^ np.uint64(step))
    key_B = splitmix64(key_B ^ rows.astype(np.uint64))
    bits_BK = splitmix64(key_B[:, None] ^ np.arange(count, dtype=np.uint64))
    uniforms: NDArray[np.float64] = (bits_BK >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms
