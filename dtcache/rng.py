"""Counter-based random numbers: pure functions of a key, not of order, process or device."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from dtcache.hashing import sha256_json


def permuted(count: int, *, seed: int, stream: str) -> NDArray[np.int64]:
    """Return a permutation of range(count), int64 (count,), keyed with (count, seed, stream)."""
    key = int(sha256_json([stream, seed, count])[:32], 16)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's output for each state in `x` (Steele, Lea and Flood 2014).

    The function is a bijection in which every input bit affects every output bit.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def sample_uniforms(
    seed: int, step: int, rows: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Return `count` uniform numbers in [0, 1) per row, float64 (B, count).

    Each number is a function of (seed, step, row, column): SplitMix64 mixes them in one after the
    other.
    """
    key_B = splitmix64(splitmix64(np.full(len(rows), seed, np.uint64)) ^ np.uint64(step))
    key_B = splitmix64(key_B ^ rows.astype(np.uint64))
    bits_BK = splitmix64(key_B[:, None] ^ np.arange(count, dtype=np.uint64))
    uniforms: NDArray[np.float64] = (bits_BK >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms


def sample_noise(
    shape: tuple[int, ...], *, seed: int, key: str, timestep: int, draw: int, flip: bool
) -> NDArray[np.float32]:
    """Return standard normal noise, fp32 of `shape`.

    Its key is the SHA-256 of (seed, key, timestep, draw, flip).

    Philox-4x64 (Salmon et al. 2011) gives the bits and the Box-Muller transform the normals. NumPy
    guarantees that Philox's bits never change; it does not guarantee that for `standard_normal`.
    """
    name = f"{seed}\0{key}\0{timestep}\0{draw}\0{int(flip)}".encode()
    key_128 = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
    count = int(np.prod(shape))
    pairs = (count + 1) // 2
    bits = np.random.Philox(key=key_128).random_raw(pairs)
    # In (0, 1], because the logarithm of 0 is not finite.
    u = ((bits >> np.uint64(32)) + np.uint64(1)).astype(np.float64) * 2.0**-32
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    radius = np.sqrt(-2.0 * np.log(u))
    normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return normals.astype(np.float32).reshape(shape)
