"""Noise: normal, keyed, and the same for ever."""

import numpy as np
import pytest

from dtcache.teacher.noise import sample_noise

PINNED = [0.606355667, 1.23933733, 0.305035293, -1.79359722]
WHO = {"seed": 0, "key": "cat/1.png", "timestep": 150, "draw": 0, "flip": False}


def test_noise_is_standard_normal() -> None:
    """Mean, variance, fourth moment and neighbour correlation are a standard normal's within 5 standard errors."""
    x = sample_noise((1000, 1000), **WHO).astype(np.float64).reshape(-1)
    se = 1 / np.sqrt(x.size)
    assert abs(x.mean()) < 5 * se
    assert abs(x.var() - 1) < 5 * se * np.sqrt(2)
    assert abs((x**4).mean() - 3) < 5 * se * np.sqrt(96)
    assert abs((x[1:] * x[:-1]).mean()) < 5 * se
    assert abs((x[: x.size // 2] * x[x.size // 2 :]).mean()) < 5 * se * np.sqrt(2)


@pytest.mark.parametrize(
    "field", [{"seed": 1}, {"key": "cat/2.png"}, {"timestep": 50}, {"draw": 1}, {"flip": True}]
)
def test_every_part_of_the_key_counts(field: dict[str, object]) -> None:
    """Another seed, key, timestep, draw or flip gives unrelated noise."""
    a = sample_noise((64, 64), **WHO)
    b = sample_noise((64, 64), **{**WHO, **field})
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.08


def test_noise_is_pinned() -> None:
    """These values are the format: a cache made by one version resumes under another.

    The tolerance is one unit in the last place of fp32, for libraries whose logarithm or cosine rounds otherwise.
    """
    got = sample_noise((4,), **WHO)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, PINNED, rtol=2e-7)


def test_noise_matches_an_independent_box_muller() -> None:
    """A scalar implementation with Python's own math, from the same 64-bit words, gives the same numbers."""
    import hashlib
    import math

    name = b"0\0cat/1.png\x00150\x000\x000"
    words = np.random.Philox(
        key=int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
    ).random_raw(3)
    cosines = []
    sines = []
    for word in map(int, words):
        radius = math.sqrt(-2 * math.log(((word >> 32) + 1) / 2**32))
        angle = 2 * math.pi * (word & 0xFFFFFFFF) / 2**32
        cosines.append(radius * math.cos(angle))
        sines.append(radius * math.sin(angle))
    np.testing.assert_allclose(sample_noise((5,), **WHO), (cosines + sines)[:5], rtol=2e-7)
