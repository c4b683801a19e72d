"""The Gaussian rate-distortion bound of a transform: PCA over channels and DCT over space, reverse
water-filling.

A Gaussian source of independent bands of variance v has, at mean squared error D, R = sum max(0,
log2(v / w) / 2) bits, where the water level w makes the sum of min(v, w) equal to the error
(Cover & Thomas, 10.3.3). This bound does not hold for every code: the bound of a source that is not
Gaussian is lower.
"""

from collections.abc import Mapping

import numpy as np
import torch

from dtcache.codec.pca_dct import forward_transform

BATCH = 32


def band_variances(
    maps: Mapping[str, np.ndarray], bases: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Return (C, H, W) mean squares of all bands of each map about its channel means, by name.

    The PCA is computed from the maps unless `bases` (C, C) are given. Pass bases if there are few
    images, because a PCA of few images fits their noise.
    """
    variances = {}
    for name, values in maps.items():
        mean, covariance = _moments(values)
        basis = np.linalg.eigh(covariance)[1] if bases is None else bases[name]
        basis_CK = torch.from_numpy(basis).float()
        mean_C = torch.from_numpy(mean).float()
        square = np.zeros(values.shape[1:])
        for start in range(0, len(values), BATCH):
            x_BCHW = torch.from_numpy(np.asarray(values[start : start + BATCH], np.float32))
            square += (
                forward_transform(x_BCHW, basis_CK, mean_C)
                .square()
                .sum(0, dtype=torch.float64)
                .numpy()
            )
        variances[name] = square / len(values)
    return variances


def energy_per_image(maps: Mapping[str, np.ndarray]) -> float:
    """Return an image's mean sum of squares about the channel means, over all maps: the denominator
    of D.
    """
    return sum(float(np.trace(_moments(values)[1])) * values[0, 0].size for values in maps.values())


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return channel means (C,) and covariance (C, C) over images and positions."""
    count, channels, height, width = values.shape
    total = np.zeros(channels)
    outer = np.zeros((channels, channels))
    for start in range(0, count, BATCH):
        x = np.moveaxis(np.asarray(values[start : start + BATCH], np.float32), 1, 0).reshape(
            channels, -1
        )
        total += x.sum(1, dtype=np.float64)
        outer += x @ x.T
    mean = total / (count * height * width)
    return mean, outer / (count * height * width) - np.outer(mean, mean)


def bound_bytes(variances: Mapping[str, np.ndarray], distortion: float) -> float:
    """Return the bytes per image of the bound at D = error over variance of all maps."""
    v = np.sort(np.concatenate([band.reshape(-1) for band in variances.values()]))
    target = distortion * v.sum()
    # With the k smallest bands wholly under water the error is their sum and a level w for each of
    # the others.
    under = np.concatenate([[0.0], np.cumsum(v)])[:-1]
    left = len(v) - np.arange(len(v))
    k = int(np.searchsorted(under + left * v, target))
    water = (target - under[k]) / left[k]
    return float(np.log2(v[k:] / water).sum() / 2 / 8)
