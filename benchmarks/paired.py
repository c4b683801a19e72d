"""Paired differences with their 95 % interval."""

import statistics
from collections.abc import Sequence

from scipy.stats import t as student_t


def bounds(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and the ends of its 95 % interval by Student's t; infinite ends for one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, float("-inf"), float("inf")
    half = (
        float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    )
    return mean, mean - half, mean + half


def interval(values: Sequence[float], unit: str, digits: int = 2) -> str:
    """Return a mean with its interval, as text."""
    mean, *ends = bounds(values)
    low, high = (f"{end:+.{digits}f}" for end in ends)
    return f"{mean:+.{digits}f}{unit} [{low}, {high}]"
