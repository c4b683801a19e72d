"""Probability tables have the right sums and floors, and variance classes select them."""

import numpy as np
import pytest

from dtcache.codec.symbol_tables import DEAD_RATIO, fit_tables, normalise, variance_class


def test_normalise_sums_to_2048_with_no_zero() -> None:
    """Frequencies sum to 2048, none is 0, and each is within 1 of its exact value."""
    for seed in range(300):
        rng = np.random.default_rng(seed)
        counts = rng.gamma(rng.uniform(0.01, 2), size=int(rng.integers(1, 257))) + 1e-12
        found = normalise(counts)
        assert found.dtype == np.uint16
        assert int(found.sum()) == 2048
        assert int(found.min()) >= 1
        exact = counts / counts.sum() * (2048 - len(counts)) + 1
        assert np.abs(found - exact).max() < 1


def test_normalise_keeps_the_order_of_counts() -> None:
    """A symbol with a higher count never gets a lower frequency."""
    for seed in range(50):
        counts = np.sort(np.random.default_rng(seed).gamma(0.5, size=40)) + 1e-9
        assert (np.diff(normalise(counts).astype(int)) >= 0).all()


def test_variance_class_is_monotone() -> None:
    """The class never falls as the ratio grows, covers -1..20, and is -1 below the dead ratio."""
    ratio = np.geomspace(1e-12, 1e6, 4001)
    found = variance_class(ratio)
    assert (np.diff(found) >= 0).all()
    np.testing.assert_array_equal(np.unique(found), np.arange(-1, 21))
    np.testing.assert_array_equal(found == -1, ratio < DEAD_RATIO)
    np.testing.assert_array_equal(variance_class(ratio, 1.3), np.where(ratio < 1.3, -1, found))
    assert variance_class(np.zeros(3)).tolist() == [-1, -1, -1]


def test_variance_class_is_half_octaves() -> None:
    """Class 4 is a deviation of one step, and each factor of sqrt(2) adds one class."""
    np.testing.assert_array_equal(variance_class(2.0 ** (np.arange(-4, 17) / 2)), np.arange(21))


@pytest.mark.parametrize("kind", [0, 4, 10, 20])
def test_fit_tables_follow_what_was_seen(kind: int) -> None:
    """A table learns observed frequencies within 2 %, keeps an escape and is zero elsewhere."""
    rng = np.random.default_rng(kind)
    deviation = 2.0 ** ((kind - 4) / 2)
    values = (
        np.rint(rng.laplace(0, deviation / np.sqrt(2), 200_000))
        .clip(-32767, 32767)
        .astype(np.int16)
    )
    tables, half = fit_tables(np.array([kind, 20]), [values, values[:0]])
    h = int(half[0])
    assert int(tables[0].sum()) == 2048
    assert not tables[0, 2 * h + 2 :].any()
    assert tables[0, 2 * h + 1] >= 1
    seen = np.array([np.mean(values == v) for v in range(-h, h + 1)])
    assert np.abs(tables[0, : 2 * h + 1] / 2048 - seen).max() < 0.02 + (2 * h + 2) / 2048
    assert int(half[1]) == 127
