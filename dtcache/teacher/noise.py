"""Noise that belongs to a sample: a pure function of what it is for, never of order, device or process."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def sample_noise(
    shape: tuple[int, ...], *, seed: int, key: str, timestep: int, draw: int, flip: bool
) -> NDArray[np.float32]:
    """Return standard normal noise (fp32) keyed with SHA-256 of (seed, key, timestep, draw, flip).

    Philox-4x64 (Salmon et al. 2011) gives the bits and the Box-Muller transform the normals: NumPy promises stable
    bit streams for ever, but not stable `standard_normal` streams.
    """
    name = f"{seed}\0{key}\0{timestep}\0{draw}\0{int(flip)}".encode()
    key_128 = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
    count = int(np.prod(shape))
    pairs = (count + 1) // 2
    bits = np.random.Philox(key=key_128).random_raw(pairs)
    # (0, 1]: the logarithm of zero does not exist.
    u = ((bits >> np.uint64(32)) + np.uint64(1)).astype(np.float64) * 2.0**-32
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    radius = np.sqrt(-2.0 * np.log(u))
    normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return normals.astype(np.float32).reshape(shape)
