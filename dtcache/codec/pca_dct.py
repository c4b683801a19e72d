"""The codec's arithmetic on a device: whitening, PCA, DCT and quantiser forwards; their inverse as a torch module."""

import functools
import math

import torch
from torch import Tensor, nn

from dtcache.codec.tap_codec import FittedTap
from dtcache.whitening import square_norms

ROUNDING = 0.42
"""Added before the floor: under 0.5 it widens the dead zone, which pays at low rates (design: codec)."""


def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal DCT-II as a float64 (size, size) matrix: coefficients = matrix @ signal."""
    k = torch.arange(size, dtype=torch.float64)[:, None]
    n = torch.arange(size, dtype=torch.float64)[None, :]
    matrix = torch.cos(math.pi * (2 * n + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def forward_transform(whitened_BCHW: Tensor, basis_CK: Tensor, mean_C: Tensor) -> Tensor:
    """Return fp32 DCT coefficients (B, K, H, W) of the PCA components of centred features."""
    height, width = whitened_BCHW.shape[2:]
    # As a batched product it takes channels-last maps, a convolution's natural output, without a copy.
    basis_BKC = basis_CK.T.expand(len(whitened_BCHW), -1, -1)
    components = torch.bmm(basis_BKC, whitened_BCHW.flatten(2)).view(
        len(whitened_BCHW), -1, height, width
    )
    rows_HH = _dct_on(height, whitened_BCHW.device)
    columns_WW = _dct_on(width, whitened_BCHW.device)
    coefficients = rows_HH @ (components @ columns_WW.T)
    # A constant has no coefficient but the first, so that this centres the features without a pass over them.
    coefficients[:, :, 0, 0] -= math.sqrt(height * width) * (mean_C @ basis_CK)
    return coefficients


@functools.cache
def _dct_on(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return dct_matrix(size).float().to(device)


class Encoder(nn.Module):
    """Features to quantised coefficients, with the squared error and energy that the quantiser left and met."""

    basis_CK: Tensor
    mean_C: Tensor
    live_N: Tensor
    step_N: Tensor
    gain_N: Tensor
    norm_N: Tensor

    def __init__(self, fitted: FittedTap) -> None:
        super().__init__()
        basis_CK = torch.from_numpy(fitted.basis).float()
        self.register_buffer("basis_CK", basis_CK)
        self.register_buffer("mean_C", torch.from_numpy(fitted.mean).float())
        live = torch.from_numpy(fitted.live)
        classes = torch.from_numpy(fitted.classes.reshape(-1)[fitted.live]).long()
        self.register_buffer("live_N", live)
        self.register_buffer("step_N", torch.from_numpy(fitted.class_step)[classes])
        self.register_buffer("gain_N", torch.from_numpy(fitted.class_gain)[classes])
        norms_K = basis_CK.double().square().sum(0).float()
        self.register_buffer(
            "norm_N", norms_K[live // (fitted.classes.shape[1] * fitted.classes.shape[2])]
        )

    def forward(self, whitened_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values (B, n) int16, squared error (B,) and energy about the channel means (B,), both float64.

        The error is |x - B c|^2 of the decoded coefficients c. DCT is orthonormal, so that it is computed on
        coefficients; B, the basis as stored in fp16, is not quite. Its columns' lengths come in; their remaining
        angles (1e-4) do not, as components are uncorrelated over the data set.
        """
        energy_B = energy_about(whitened_BCHW, self.mean_C)
        maps_BKHW = forward_transform(whitened_BCHW, self.basis_CK, self.mean_C)
        coefficients = maps_BKHW.flatten(1)[:, self.live_N]
        values = quantise(coefficients, self.step_N)
        decoded = values * self.step_N * self.gain_N
        gained = decoded * (decoded * self.norm_N - 2 * coefficients)
        error_B = energy_B + gained.sum(1, dtype=torch.float64)
        return values.to(torch.int16), error_B.clamp_min(0), energy_B


def energy_about(whitened_BCHW: Tensor, mean_C: Tensor) -> Tensor:
    """Return |x - mean|^2 a map, (B,) float64."""
    mean = mean_C.double()
    sum_BC = whitened_BCHW.flatten(2).sum(2).double()
    return (
        square_norms(whitened_BCHW)
        - 2 * sum_BC @ mean
        + whitened_BCHW[0, 0].numel() * mean.square().sum()
    )


def quantise(coefficients: Tensor, step: Tensor) -> Tensor:
    """Return signed integers (as fp32, within int16) under a dead-zone quantiser with rounding offset 0.42."""
    scaled = coefficients / step
    return (scaled.sign() * (scaled.abs() + ROUNDING).floor()).clamp(-32767, 32767)


class Decoder(nn.Module):
    """Quantised coefficients to whitened features, as matrix products on the student's device."""

    basis_CK: Tensor
    mean_C: Tensor
    live_N: Tensor
    scale_N: Tensor
    rows_HH: Tensor
    columns_WW: Tensor

    def __init__(self, fitted: FittedTap) -> None:
        super().__init__()
        components, self.height, self.width = fitted.classes.shape
        classes = torch.from_numpy(fitted.classes.reshape(-1)[fitted.live]).long()
        scale = torch.from_numpy(fitted.class_step * fitted.class_gain)[classes]
        self.register_buffer("basis_CK", torch.from_numpy(fitted.basis).float())
        self.register_buffer("mean_C", torch.from_numpy(fitted.mean).float())
        self.register_buffer("live_N", torch.from_numpy(fitted.live))
        self.register_buffer("scale_N", scale)
        self.register_buffer("rows_HH", dct_matrix(self.height).float())
        self.register_buffer("columns_WW", dct_matrix(self.width).float())
        self.components = components

    @torch.no_grad()
    def forward(self, values_BN: Tensor) -> Tensor:
        """Return decoded whitened features, fp32 (B, C, H, W), of int16 values (B, n).

        Always fp32: under autocast the products would round the targets.
        """
        with torch.autocast(values_BN.device.type, enabled=False):
            count = len(values_BN)
            dense = self.scale_N.new_zeros(count, self.components * self.height * self.width)
            dense.index_copy_(1, self.live_N, values_BN * self.scale_N)
            # Channels last, as the student's maps are: the loss then reads both in one order.
            maps = dense.view(count, self.components, self.height * self.width).mT @ self.basis_CK.T
            maps = self.rows_HH.T @ maps.view(count, self.height, -1)
            maps = self.columns_WW.T @ maps.view(count * self.height, self.width, -1)
            maps = (maps + self.mean_C).view(count, self.height, self.width, -1)
            return maps.permute(0, 3, 1, 2)
