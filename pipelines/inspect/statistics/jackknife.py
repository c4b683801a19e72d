"""Estimates with confidence intervals: a delete-one-group jackknife over groups of samples."""

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
    """None where there are too few samples to tell."""
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Half the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def to_json(self) -> Json:
        """Return the estimate as JSON values."""
        return {"value": self.value, "low": self.low, "high": self.high}


def jackknife(
    parts: Sequence[T], statistic: Callable[[Sequence[T]], float], sampled: float
) -> Estimate | None:
    """Return a statistic of all parts, with the interval that leaving out one part at a time gives.

    `sampled` is the share of all samples that the parts hold: the error shrinks by sqrt(1 - sampled), and is none where
    they are all (finite population). None where the statistic is not finite. (Efron and Tibshirani, An Introduction to
    the Bootstrap, chapter 11; the quantile is Student's, with a degree of freedom less than there are parts.)
    """
    value = statistic(parts)
    if not np.isfinite(value):
        return None
    if sampled >= 1:
        return Estimate(value=value, low=value, high=value)
    if len(parts) < 2:
        return Estimate(value=value, low=None, high=None)
    from scipy.stats import t

    without = np.array([statistic([*parts[:i], *parts[i + 1 :]]) for i in range(len(parts))])
    if not np.isfinite(without).all():
        return Estimate(value=value, low=None, high=None)
    count = len(parts)
    variance = (count - 1) / count * float(np.square(without - without.mean()).sum())
    reach = float(t.ppf(0.975, count - 1)) * (variance * (1 - sampled)) ** 0.5
    return Estimate(value=value, low=value - reach, high=value + reach)


def proportion(hits: int, count: int) -> Estimate:
    """Return a share of independent trials with Wilson's 95 % interval."""
    z = 1.959964
    share = hits / count
    centre = share + z * z / (2 * count)
    spread = z * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5
    scale = 1 + z * z / count
    return Estimate(value=share, low=(centre - spread) / scale, high=(centre + spread) / scale)
