"""Counter-based random numbers: uniform, normal, keyed, and the same in every version."""

import hashlib
import math

import numpy as np
import pytest

from dtcache.rng import permuted, sample_noise, sample_uniforms, splitmix64

ROWS = np.arange(5000)
MASK = (1 << 64) - 1
PINNED = [0.606355667, 1.23933733, 0.305035293, -1.79359722]
WHO = {"seed": 0, "key": "cat/1.png", "timestep": 150, "draw": 0, "flip": False}


def test_noise_is_standard_normal() -> None:
    """Moments and neighbour correlation are a standard normal's within 5 standard errors."""
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
def test_noise_depends_on_every_field_of_its_key(field: dict[str, object]) -> None:
    """A different seed, key, timestep, draw or flip gives uncorrelated noise."""
    a = sample_noise((64, 64), **WHO)
    b = sample_noise((64, 64), **{**WHO, **field})
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.08


def test_noise_is_pinned() -> None:
    """The noise values are part of the cache format, so a resume under another version is exact.

    The tolerance is one unit in the last place of fp32, since math libraries round logarithms and
    cosines differently.
    """
    got = sample_noise((4,), **WHO)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, PINNED, rtol=2e-7)


def test_noise_matches_an_independent_box_muller() -> None:
    """A scalar implementation with Python's `math` gives the same numbers from the same words."""
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


def test_permuted_is_the_order_of_every_cache_and_run_so_far() -> None:
    """The order is the one that NumPy gave when format 1 was defined.

    NumPy guarantees the bits of Philox, but not the result of `Generator.permutation`. If this test
    fails, a new NumPy has changed the shuffle. Then unfinished caches refuse to resume, because
    their sample list is in another order, a resumed training run would repeat some samples of its
    epoch and skip others, and recorded results can no longer be reproduced. Do not change the
    numbers here: implement the old shuffle in `permuted`.
    """
    assert permuted(12, seed=1, stream="rows").tolist() == [10, 3, 0, 11, 7, 4, 2, 9, 5, 8, 6, 1]
    assert permuted(12, seed=0, stream="epoch-0").tolist() == [1, 8, 6, 4, 5, 3, 7, 9, 2, 10, 11, 0]


def test_each_seed_and_stream_has_its_own_permutation() -> None:
    """(count, seed, stream) gives one permutation, and any other key a different one."""
    order = permuted(1000, seed=1, stream="rows")
    assert sorted(order.tolist()) == list(range(1000))
    np.testing.assert_array_equal(permuted(1000, seed=1, stream="rows"), order)
    others = [
        permuted(1000, seed=2, stream="rows"),
        permuted(1000, seed=1, stream="epoch-0"),
        permuted(999, seed=1, stream="rows"),
    ]
    assert all((other[:999] != order[:999]).mean() > 0.9 for other in others)


def mixed(x: int) -> int:
    """Return SplitMix64's output for a state, in Python integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_splitmix_gives_its_published_numbers() -> None:
    """A generator that starts at 1234567 gives the published test numbers."""
    states = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_uniforms_belong_to_the_row_and_the_step() -> None:
    """Uniforms equal those of Python integers and depend only on seed, step, row and column."""
    uniforms = sample_uniforms(3, 17, np.array([9, 4]), 2)
    expected = mixed(mixed(mixed(mixed(3) ^ 17) ^ 4) ^ 1) >> 11
    assert uniforms[1, 1] == expected / 2**53
    assert np.array_equal(uniforms[1:], sample_uniforms(3, 17, np.array([4]), 2))
    others = [sample_uniforms(*key, np.array([4]), 2) for key in ((4, 17), (3, 18))]
    assert len({*uniforms.ravel().tolist(), *np.ravel(others).tolist()}) == 8


def test_uniforms_are_uniform_and_independent() -> None:
    """Mean, variance and correlation, per column and across two steps, are those of uniforms."""
    x = np.concatenate([sample_uniforms(0, step, ROWS, 4) for step in (0, 1)], 1)
    assert x.min() >= 0 and x.max() < 1
    np.testing.assert_allclose(x.mean(0), 0.5, atol=0.02)
    np.testing.assert_allclose(x.var(0), 1 / 12, atol=0.005)
    assert np.abs(np.corrcoef(x.T) - np.eye(8)).max() < 0.06
