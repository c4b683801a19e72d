"""Fits the transform codec: PCA, band statistics, and the step that meets a target size.

The statistics come from two noise draws. Shapes: M views, C channels, H rows, W columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.codec.float16 import HalfTap
from dtcache.codec.pca_dct import DEAD, FittedTap, forward_transform, quantise
from dtcache.codec.symbol_tables import DEAD_RATIO, fit_tables, variance_class
from dtcache.codec.tap_codec import TapCodec

CHUNK = 16
MAX_LEVEL = 6
"""Most half octaves that a band's share of noise adds to its step: a factor of 2^(6/2) = 8."""
SMOOTHING = 8.0
"""Weight, in samples, of a frequency ring's pooled variance in a coefficient's variance."""
MAX_SOLVE_VALUES = 40_000_000
STEP_RANGE = (0.02, 64.0)
GAIN_RANGE = (1.0, 2.5)
DEAD_RATIO_FOR_DISTORTION = 2.0**-1.5

Aim = Literal["student", "distortion"]
"""The error that a fit minimises: a student's error, or the squared error.

The squared error serves soft labels and comparisons of codecs.
"""

Whitened = NDArray[np.float16]
"""Whitened features of M views under two noise draws, (2, M, C, H, W).

The array is a memory map for large teachers. A teacher without noise has one draw, (1, M, C, H, W):
a second draw would equal the first.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TapStatistics:
    """Statistics of one tap's bands, measured before a step is chosen."""

    basis: NDArray[np.float16]
    """(C, C): PCA components as columns, by falling variance."""
    mean: NDArray[np.float16]
    """(C,): channel means."""
    variance: NDArray[np.float64]
    """(C, H, W): mean square of each coefficient."""
    noise_share: NDArray[np.float64]
    """(C, H, W): share of that variance which differs between noise draws, in [0, 1]."""
    coefficients: NDArray[np.float32]
    """(2, m, C, H, W): coefficients of m of the fit's views under both draws.

    If there is one draw only, its coefficients stand twice. The step is solved on draw 0.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Solved:
    """A global step, the codecs fitted at that step, their size and their error."""

    step: float | None
    """None if features stay float16."""
    fit: Mapping[str, TapCodec]
    bytes_per_view: float
    determined_error: dict[str, float]
    """By tap: the result of the function `determined_error`."""


def tap_statistics(whitened: Whitened) -> TapStatistics:
    """Fit PCA and measure every band, with moments in fp64.

    The result depends on the number of threads, so use one thread. The covariance is shrunk towards
    its diagonal by 1/M; with one image, PCA is the identity up to order.
    """
    draws, views, channels, height, width = whitened.shape
    total = np.zeros(channels)
    outer = np.zeros((channels, channels))
    for start in range(0, views, CHUNK):
        x = np.moveaxis(np.asarray(whitened[:, start : start + CHUNK], np.float64), 2, 0).reshape(
            channels, -1
        )
        total += x.sum(1)
        outer += x @ x.T
    count = draws * views * height * width
    mean = (total / count).astype(np.float16)
    covariance = outer / count - np.outer(total / count, total / count)
    covariance = (1 - 1 / views) * covariance + np.diag(np.diag(covariance)) / views
    eigenvalues, vectors = np.linalg.eigh(covariance)
    basis = vectors[:, np.argsort(-eigenvalues, kind="stable")]
    # An eigenvector's sign is arbitrary; fix it, so that the fit does not depend on the library.
    basis = (
        basis * np.where(basis[np.abs(basis).argmax(0), np.arange(channels)] < 0, -1, 1)
    ).astype(np.float16)

    square = np.zeros((channels, height, width))
    difference = np.zeros((channels, height, width))
    kept: list[NDArray[np.float32]] = []
    keep = max(1, min(views, MAX_SOLVE_VALUES // (2 * channels * height * width)))
    basis_CK = torch.from_numpy(basis).float()
    mean_C = torch.from_numpy(mean).float()
    for start in range(0, views, CHUNK):
        transformed = [
            forward_transform(
                torch.from_numpy(np.asarray(draw[start : start + CHUNK], np.float32)),
                basis_CK,
                mean_C,
            )
            for draw in whitened
        ]
        first = transformed[0]
        second = transformed[-1]
        square += ((first.double().square() + second.double().square()) / 2).sum(0).numpy()
        difference += (first.double() - second.double()).square().sum(0).numpy() / 2
        kept.append(np.stack([first.numpy(), second.numpy()])[:, : max(0, keep - start)])
    variance = _smooth(square / views, views)
    noise = _smooth(difference / views, views)
    share = np.clip(noise / np.maximum(variance, 1e-12), 0.0, 1.0)
    return TapStatistics(
        basis=basis,
        mean=mean,
        variance=variance,
        noise_share=share,
        coefficients=np.concatenate(kept, 1),
    )


def _smooth(moment: NDArray[np.float64], views: int) -> NDArray[np.float64]:
    """Shrink each coefficient's moment towards the mean of its frequency ring.

    Few views estimate the mean of a ring better than a single coefficient.
    """
    height, width = moment.shape[1:]
    ring = np.maximum(
        *np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    )
    ring = np.unique(ring, return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(ring)
    pooled = np.stack([np.bincount(ring, band.reshape(-1)) / sizes for band in moment])[
        :, ring
    ].reshape(moment.shape)
    return (views * moment + SMOOTHING * pooled) / (views + SMOOTHING)


def quantised_fit(statistics: TapStatistics, step: float, aim: Aim = "student") -> FittedTap:
    """Return the fit of one tap at a global step: classes, steps, gains and probability tables.

    If `aim` is student, a band's step is step / (share of the band that the image determines). An
    error in a band that is mostly noise costs a student little, so reverse water-filling works on
    the determined part alone. The gain undoes the shrinkage by the dead zone.

    If `aim` is distortion, every band has the same step, and the gain minimises the squared error.
    Bands with few nonzero values are dropped if a finer step in the other bands costs less. This
    saves 4 % of the bytes at 50x, but students get worse.
    """
    dead = DEAD_RATIO if aim == "student" else DEAD_RATIO_FOR_DISTORTION
    share = statistics.noise_share if aim == "student" else np.zeros_like(statistics.noise_share)
    determined = np.clip(1.0 - share, 2.0 ** (-MAX_LEVEL / 2), 1.0)
    level = np.clip(np.rint(-2 * np.log2(determined)), 0, MAX_LEVEL).astype(np.int64)
    band_step = step * 2.0 ** (level / 2)
    table = variance_class(np.sqrt(statistics.variance) / band_step, dead)
    joint, inverse = np.unique(
        np.where(table < 0, -1, table * (MAX_LEVEL + 1) + level), return_inverse=True
    )
    inverse = inverse.reshape(level.shape) - int(joint[0] < 0)
    joint = joint[joint >= 0]
    kinds, class_table = np.unique(joint // (MAX_LEVEL + 1), return_inverse=True)
    class_step = (step * 2.0 ** ((joint % (MAX_LEVEL + 1)) / 2)).astype(np.float32)
    components = int(np.flatnonzero((inverse >= 0).any((1, 2))).max(initial=-1)) + 1
    classes = np.where(inverse < 0, DEAD, inverse)[:components].astype(np.uint8)

    flat = classes.reshape(-1)
    coefficients = statistics.coefficients[0].reshape(statistics.coefficients.shape[1], -1)
    gains = np.ones(len(kinds), np.float64)
    values = []
    for t in range(len(kinds)):
        table_of = class_table[np.where(flat == DEAD, 0, flat)]
        members = np.flatnonzero((flat != DEAD) & (table_of == t))
        c = torch.from_numpy(coefficients[:, members])
        steps = torch.from_numpy(class_step[flat[members]])
        q = quantise(c, steps)
        gains[t] = _gain(c, q * steps, aim)
        values.append(q.numpy().astype(np.int16).reshape(-1))
    tables, half_width = fit_tables(kinds, values)
    return FittedTap(
        basis=np.ascontiguousarray(statistics.basis[:, :components]),
        mean=statistics.mean,
        classes=classes,
        class_step=class_step,
        class_gain=gains[class_table].astype(np.float32),
        class_table=class_table.astype(np.uint8),
        tables=tables,
        half_width=half_width,
    )


def _gain(c: Tensor, decoded: Tensor, aim: Aim) -> float:
    """Return the gain of decoded coefficients.

    For a student the gain is E[c^2] / E[c c_hat], within GAIN_RANGE; for the least squared error it
    is E[c c_hat] / E[c_hat^2].
    """
    cross, energy, decoded_energy = (
        float((a * b).sum(dtype=torch.float64))
        for a, b in ((c, decoded), (c, c), (decoded, decoded))
    )
    if aim == "distortion":
        return cross / decoded_energy if decoded_energy > 0 else 1.0
    return float(np.clip(energy / cross, *GAIN_RANGE)) if cross > 0 else GAIN_RANGE[1]


def determined_error(statistics: TapStatistics, fitted: FittedTap) -> float:
    """Return the codec's relative squared error in the part of a tap that the image determines.

    The error is divided by the variance of that part. Two noise draws of one image share exactly
    the part that the image determines. Products between the draws therefore estimate error and
    variance without bias: sum E[e_1 e_2] / sum E[c_1 c_2] with e = c - decoded c. This error is the
    bias that a student learns; the codec's error in the noise does not contribute (design: codec).
    """
    both = torch.from_numpy(statistics.coefficients).flatten(2)
    live = torch.from_numpy(fitted.live)
    classes = torch.from_numpy(fitted.live_classes).long()
    step = torch.from_numpy(fitted.class_step)[classes]
    scale = step * torch.from_numpy(fitted.class_gain)[classes]
    error = 0.0
    variance = 0.0
    for first, second in zip(*both, strict=True):
        variance += float((first * second).sum(dtype=torch.float64))
        e_1 = first.clone()
        e_2 = second.clone()
        for c, e in ((first, e_1), (second, e_2)):
            e[live] -= quantise(c[live], step) * scale
        error += float((e_1 * e_2).sum(dtype=torch.float64))
    return max(0.0, error) / variance if variance > 0 else 0.0


def solve_step(
    statistics: Mapping[str, TapStatistics],
    size_of: Callable[[dict[str, FittedTap]], float],
    target: float,
    aim: Aim = "student",
) -> Solved:
    """Bisect, in the logarithm, for the step at which `size_of(fit)` is `target` bytes per view.

    All taps have the same step: whitened features have unit variance, so equal steps spend bits
    where they reduce the total error most. If even the coarsest step costs more than `target`, that
    step is returned.
    """
    low = np.log(STEP_RANGE[0])
    high = np.log(STEP_RANGE[1])
    tried: list[tuple[float, float]] = []
    for _ in range(14):
        step = float(np.float32(np.exp((low + high) / 2)))
        fit = {name: quantised_fit(s, step, aim) for name, s in statistics.items()}
        size = size_of(fit)
        tried.append((size, step))
        if abs(size / target - 1) < 0.002:
            break
        low, high = (np.log(step), high) if size > target else (low, np.log(step))
    size, step = min(tried, key=lambda t: abs(np.log(t[0] / target)))
    fit = {name: quantised_fit(s, step, aim) for name, s in statistics.items()}
    errors = {name: determined_error(s, fit[name]) for name, s in statistics.items()}
    return Solved(step=step, fit=fit, bytes_per_view=size, determined_error=errors)


def half_fits(statistics: Mapping[str, TapStatistics]) -> Solved:
    """Return the codecs of features that stay float16, without a step and without an error."""
    fit = {
        name: HalfTap(mean=s.mean, grid=np.array(s.variance.shape[1:], np.int32))
        for name, s in statistics.items()
    }
    size = float(sum(tap.section_bound for tap in fit.values()))
    return Solved(step=None, fit=fit, bytes_per_view=size, determined_error=dict.fromkeys(fit, 0.0))
