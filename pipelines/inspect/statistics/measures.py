"""What follows from sums and pooled features: scale, rank, noise, similarity. Pure functions; C channels, N samples."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.inspect.statistics.sums import GroupSums, add

DEAD_SHARE = 1e-4
"""A channel is dead whose variance is under this share of the tap's mean variance."""

Float = NDArray[np.float64]


def mean(parts: Sequence[GroupSums]) -> float:
    """Return the mean in the teacher's own scale."""
    whole = add(list(parts))
    return whole.raw / whole.values


def std(parts: Sequence[GroupSums]) -> float:
    """Return the standard deviation in the teacher's own scale."""
    whole = add(list(parts))
    return math.sqrt(max(0.0, whole.raw_square / whole.values - (whole.raw / whole.values) ** 2))


def saturation(parts: Sequence[GroupSums]) -> float:
    """Return the share of coded values at the limit of their type."""
    whole = add(list(parts))
    return whole.saturated / max(1, whole.coded)


def escapes(parts: Sequence[GroupSums]) -> float:
    """Return the share of coded values outside of their class's table."""
    whole = add(list(parts))
    return whole.escaped / max(1, whole.coded)


def covariance(whole: GroupSums) -> Float:
    """Return the (C, C) covariance of whitened channels over samples, views and positions."""
    count = whole.values / len(whole.whitened_C)
    mean_C = whole.whitened_C / count
    return whole.products_CC / count - np.outer(mean_C, mean_C)


def dead_channels(parts: Sequence[GroupSums]) -> float:
    """Return the share of channels that hardly vary."""
    variance_C = np.diag(covariance(add(list(parts))))
    return float((variance_C <= DEAD_SHARE * variance_C.mean()).mean())


def effective_rank(parts: Sequence[GroupSums]) -> float:
    """Return exp(entropy) of the covariance's normalised eigenvalues (Roy and Vetterli 2007): 1 to C."""
    values = np.linalg.eigvalsh(covariance(add(list(parts)))).clip(0)
    share = values / max(values.sum(), 1e-300)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else float("nan")


def noise_share(parts: Sequence[GroupSums]) -> float:
    """Return the share of the variance about the channel means that another draw changes; NaN where there is one."""
    whole = add(list(parts))
    noise, squares = whole.between_draws
    count = whole.values / len(whole.whitened_C)
    about_means = squares - float(np.square(whole.whitened_C).sum()) / count
    return noise / about_means if about_means > 0 else float("nan")


def hsic(x_NC: Float, y_ND: Float) -> float:
    """Return the unbiased Hilbert-Schmidt independence criterion of linear kernels (Song et al. 2012, eq. 5).

    Needs N of 4 or more; it does not grow with the number of channels, as the plain one does when N is small.
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
    """Return linear CKA of (HSIC_xy, HSIC_xx, HSIC_yy) a minibatch (Nguyen, Raghu and Kornblith 2021, eq. 3)."""
    xy, xx, yy = np.mean(np.array(batches), 0)
    return float(xy / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else float("nan")
