"""Statistics of paired students: means, differences with their intervals, and power.

Differences are paired by seed: students of one seed share initial weights, order and views.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.stats import nct
from scipy.stats import t as student_t

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The values of an arm."""

    mean: float
    sd: float | None
    """Standard deviation with n - 1; None for one value."""
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """An arm's values minus the baseline's, paired by seed."""

    mean: float
    n: int
    low: float | None
    """Lower end of the 95 % interval by Student's t; None for one pair."""
    high: float | None
    detectable: float | None
    """Smallest true difference that a two-sided t-test at 5 % finds with 80 % power at this n."""

    @property
    def verdict(self) -> str:
        """`higher`, `lower`, `tie` if the interval contains 0, or `no interval` for one pair."""
        if self.low is None or self.high is None:
            return "no interval"
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "tie"


def spread(values: Sequence[float]) -> Spread:
    """Return mean, standard deviation and number of values. Raises ValueError for none."""
    return Spread(
        mean=statistics.fmean(values),
        sd=statistics.stdev(values) if len(values) > 1 else None,
        n=len(values),
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the ends of the mean's 95 % interval by Student's t; None for one value."""
    of_values = spread(values)
    if of_values.sd is None:
        return None
    t = float(student_t.ppf((1 + CONFIDENCE) / 2, of_values.n - 1))
    half = t * of_values.sd / math.sqrt(of_values.n)
    return of_values.mean - half, of_values.mean + half


def difference(differences: Sequence[float]) -> Difference:
    """Return mean, interval and detectable difference of paired differences."""
    of_pairs = spread(differences)
    ends = mean_interval(differences)
    return Difference(
        mean=of_pairs.mean,
        n=of_pairs.n,
        low=ends[0] if ends else None,
        high=ends[1] if ends else None,
        detectable=detectable(of_pairs.sd, of_pairs.n) if of_pairs.sd is not None else None,
    )


def pairs(arm: Mapping[int | None, float], baseline: Mapping[int | None, float]) -> list[float]:
    """Return an arm's values minus the baseline's, for every seed that both have.

    The value of seed None, of a backbone that all seeds share, is paired with every seed.
    """
    seeds: list[int | None] = [*sorted(s for s in {*arm, *baseline} if s is not None)]
    if not seeds:
        seeds = [None]
    pairs_of = [(_value(arm, seed), _value(baseline, seed)) for seed in seeds]
    return [a - b for a, b in pairs_of if a is not None and b is not None]


def _value(values: Mapping[int | None, float], seed: int | None) -> float | None:
    return values.get(seed, values.get(None))


def detectable(sd: float, n: int) -> float:
    """Return the smallest true mean that a two-sided t-test at 5 % finds with 80 % power.

    `sd` is the standard deviation of the paired differences, `n` their number, at least 2. The
    test statistic has a noncentral t distribution with n - 1 degrees of freedom and noncentrality
    mean / (sd / sqrt(n)) (Cohen, Statistical Power Analysis, chapter 2).
    """
    critical = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1))

    def missing(noncentrality: float) -> float:
        # The lower tail, as the upper one of the mirrored distribution: scipy's cdf is NaN there.
        tails = (nct.sf(critical, n - 1, sign * noncentrality) for sign in (1, -1))
        return float(sum(tails)) - POWER

    # At a noncentrality of 2 critical values, the power is over 0.95 for every n from 2 on.
    return float(brentq(missing, 1e-9, 2 * critical)) * sd / math.sqrt(n)
