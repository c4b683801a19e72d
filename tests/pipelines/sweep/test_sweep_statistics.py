"""Statistics of paired students, against scipy's tests and numerical integration."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad

from pipelines.sweep.statistics import detectable, difference, mean_interval, pairs, spread


def power(noncentrality: float, n: int) -> float:
    """Return the power of a two-sided t-test at 5 %, by integration over the sample's SD."""
    df = n - 1
    critical = stats.t.ppf(0.975, df)

    def density(s: float) -> float:
        found = stats.norm.cdf(noncentrality - critical * s)
        found += stats.norm.cdf(-noncentrality - critical * s)
        return float(found * stats.chi.pdf(s * math.sqrt(df), df) * math.sqrt(df))

    return float(quad(density, 0, 8, limit=500, points=[noncentrality / critical])[0])


@pytest.mark.parametrize("n", [2, 3, 5, 10, 100])
def test_the_detectable_difference_has_80_per_cent_power(n: int) -> None:
    """A true difference of the returned size is found in 80 % of experiments."""
    found = detectable(0.7, n)
    assert power(found / (0.7 / math.sqrt(n)), n) == pytest.approx(0.8, abs=1e-6)


def test_intervals_are_those_of_a_paired_t_test() -> None:
    """Mean and interval are those of scipy's paired t-test."""
    rng = np.random.default_rng(0)
    a = rng.normal(1, 2, 6)
    b = rng.normal(0, 2, 6)
    of_pairs = difference(list(a - b))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (of_pairs.low, of_pairs.high) == (pytest.approx(low), pytest.approx(high))
    assert of_pairs.mean == pytest.approx((a - b).mean())
    assert spread(list(a)).sd == pytest.approx(a.std(ddof=1))
    ends = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert mean_interval(list(a)) == (pytest.approx(ends.low), pytest.approx(ends.high))


def test_verdicts_follow_the_interval() -> None:
    """An interval that contains 0 is a tie; one pair has no interval."""
    assert difference([1.0, 1.1, 0.9]).verdict == "higher"
    assert difference([-1.0, -1.1, -0.9]).verdict == "lower"
    assert difference([1.0, -1.1, 0.9]).verdict == "tie"
    assert difference([0.0, 0.0]).verdict == "tie"
    alone = difference([0.5])
    assert (alone.verdict, alone.low, alone.detectable, alone.n) == ("no interval", None, None, 1)
    assert mean_interval([0.5]) is None


def test_seeds_that_both_arms_have_are_paired() -> None:
    """Pairs are of one seed; the one value of a fixed backbone is paired with every seed."""
    assert pairs({0: 3.0, 1: 5.0, 2: 9.0}, {1: 1.0, 2: 2.0, 3: 0.0}) == [4.0, 7.0]
    assert pairs({0: 3.0, 1: 5.0}, {None: 1.0}) == [2.0, 4.0]
    assert pairs({None: 1.0}, {0: 3.0, 1: 5.0}) == [-2.0, -4.0]
    assert pairs({None: 1.0}, {None: 3.0}) == [-2.0]
    assert pairs({0: 1.0}, {1: 3.0}) == []
    assert pairs({0: 1.0}, {}) == []
