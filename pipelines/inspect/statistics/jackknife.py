"""Estimates with 95 % confidence intervals: a delete-one-group jackknife, and Wilson's interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dtcache.recipe import Json

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A number and its 95 % confidence interval."""

    value: float
    low: float | None
    """None if there are too few samples for an interval."""
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def to_json(self) -> Json:
        """Return the estimate as JSON values."""
        return {"value": self.value, "low": self.low, "high": self.high}


def jackknife(
    groups: Sequence[T], statistic: Callable[[Sequence[T]], float], sampled: float
) -> Estimate | None:
    """Return a statistic of all groups, with the interval from leaving out one group at a time.

    `sampled` is the share of all samples that the groups hold. The error is scaled by
    sqrt(1 - sampled), the correction for a finite population, and is 0 if `sampled` is 1. Returns
    None if the statistic is not finite. Source: Efron and Tibshirani, An Introduction to the
    Bootstrap, chapter 11; the quantile is that of Student's t with len(groups) - 1 degrees of
    freedom.
    """
    value = statistic(groups)
    if not np.isfinite(value):
        return None
    if sampled >= 1:
        return Estimate(value=value, low=value, high=value)
    count = len(groups)
    if count < 2:
        return Estimate(value=value, low=None, high=None)
    from scipy.stats import t

    left_out = np.array([statistic([*groups[:i], *groups[i + 1 :]]) for i in range(count)])
    if not np.isfinite(left_out).all():
        return Estimate(value=value, low=None, high=None)
    variance = (count - 1) / count * float(np.square(left_out - left_out.mean()).sum())
    half_width = float(t.ppf(0.975, count - 1)) * (variance * (1 - sampled)) ** 0.5
    return Estimate(value=value, low=value - half_width, high=value + half_width)


def proportion(hits: int, count: int) -> Estimate:
    """Return a share of independent trials with Wilson's 95 % interval."""
    z = 1.959964
    share = hits / count
    centre = share + z * z / (2 * count)
    spread = z * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5
    scale = 1 + z * z / count
    return Estimate(value=share, low=(centre - spread) / scale, high=(centre + spread) / scale)
