"""Measures from sums and pooled features: scale, rank, noise, similarity. Pure functions.

Shape suffixes: C and D channels, N samples.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.inspect.statistics.sums import GroupSums, add

DEAD_SHARE = 1e-4
"""A channel is dead if its variance is under this share of the tap's mean variance."""

Float = NDArray[np.float64]


def mean(groups: Sequence[GroupSums]) -> float:
    """Return the mean of the raw values, in the teacher's scale."""
    total = add(groups)
    return total.raw / total.values


def std(groups: Sequence[GroupSums]) -> float:
    """Return the standard deviation of the raw values, in the teacher's scale."""
    total = add(groups)
    return math.sqrt(max(0.0, total.raw_square / total.values - (total.raw / total.values) ** 2))


def saturation(groups: Sequence[GroupSums]) -> float:
    """Return the share of coded values at the limit of their type."""
    total = add(groups)
    return total.saturated / max(1, total.coded)


def escapes(groups: Sequence[GroupSums]) -> float:
    """Return the share of coded values outside their variance class's symbol table."""
    total = add(groups)
    return total.escaped / max(1, total.coded)


def covariance(total: GroupSums) -> Float:
    """Return the (C, C) covariance of whitened channels over samples, views and positions."""
    count = total.values / len(total.whitened_C)
    mean_C = total.whitened_C / count
    covariance_CC = total.products_CC / count
    covariance_CC -= np.outer(mean_C, mean_C)
    return covariance_CC


def dead_channels(groups: Sequence[GroupSums]) -> float:
    """Return the share of channels whose variance is at most `DEAD_SHARE` of the mean variance."""
    variance_C = np.diag(covariance(add(groups)))
    return float((variance_C <= DEAD_SHARE * variance_C.mean()).mean())


def effective_rank(groups: Sequence[GroupSums]) -> float:
    """Return exp(entropy) of the covariance's normalised eigenvalues, from 1 to C.

    Source: Roy and Vetterli 2007.
    """
    values = np.linalg.eigvalsh(covariance(add(groups))).clip(0)
    share = values / max(values.sum(), 1e-300)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else float("nan")


def noise_share(groups: Sequence[GroupSums]) -> float:
    """Return the share of the variance about the channel means that differs between noise draws.

    NaN if the cache has one draw.
    """
    total = add(groups)
    noise, squares = total.between_draws
    count = total.values / len(total.whitened_C)
    about_means = squares - float(np.square(total.whitened_C).sum()) / count
    return noise / about_means if about_means > 0 else float("nan")


def hsic(x_NC: Float, y_ND: Float) -> float:
    """Return the unbiased Hilbert-Schmidt independence criterion of linear kernels, for N >= 4.

    The biased estimator grows with the number of channels if N is small; this one does not. Source:
    Song et al. 2012, eq. 5.
    """
    count = len(x_NC)
    k_NN = x_NC @ x_NC.T
    l_NN = y_ND @ y_ND.T
    np.fill_diagonal(k_NN, 0)
    np.fill_diagonal(l_NN, 0)
    rows_k = k_NN.sum(1)
    rows_l = l_NN.sum(1)
    trace = float((k_NN * l_NN).sum())
    sums = float(rows_k.sum() * rows_l.sum()) / ((count - 1) * (count - 2))
    return (trace + sums - 2 * float(rows_k @ rows_l) / (count - 2)) / (count * (count - 3))


def cka(batches: Sequence[tuple[float, float, float]]) -> float:
    """Return linear CKA from (HSIC_xy, HSIC_xx, HSIC_yy) per minibatch.

    Source: Nguyen, Raghu and Kornblith 2021, eq. 3.
    """
    xy, xx, yy = np.mean(np.array(batches), 0)
    return float(xy / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else float("nan")
