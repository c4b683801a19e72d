"""The Gaussian rate-distortion bound of PCA over channels and DCT over space.

Reverse water-filling (Cover & Thomas, 10.3.3): a Gaussian source of independent bands with
variances v needs R = sum max(0, log2(v / w) / 2) bits at a squared error E. The water level w
solves sum min(v, w) = E. The features are not Gaussian, and the bound of a source that is not
Gaussian is lower. So a code may need fewer bits than R.
"""

from collections.abc import Mapping

import numpy as np
import torch

from dtcache.codec.pca_dct import forward_transform

BATCH = 32


def band_variances(
    maps: Mapping[str, np.ndarray], bases: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Return each tap's band variances (C, H, W) about its channel means, in float64.

    `maps` are (M, C, H, W). The PCA is computed from the maps if `bases` is None; otherwise `bases`
    gives a (C, C) basis per tap. Pass bases if there are few images, because a PCA of few images
    fits their noise.
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
    """Return the sum of squares per image about the channel means of all taps.

    This is the denominator of D.
    """
    return sum(float(np.trace(_moments(values)[1])) * values[0, 0].size for values in maps.values())


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the channel means (C,) and covariance (C, C) of all images and positions."""
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
    """Return the bound in bytes per image at D = squared error / total variance of all bands."""
    v = np.sort(np.concatenate([band.reshape(-1) for band in variances.values()]))
    target = distortion * v.sum()
    # If the k smallest variances lie below the water level, the error is their sum plus the water
    # level for each of the other bands.
    below = np.concatenate([[0.0], np.cumsum(v)])[:-1]
    above = len(v) - np.arange(len(v))
    k = int(np.searchsorted(below + above * v, target))
    water = (target - below[k]) / above[k]
    return float(np.log2(v[k:] / water).sum() / 2 / 8)
