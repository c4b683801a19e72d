"""The transform codec of one tap: PCA over channels, full-frame DCT, quantiser, rANS.

The quantiser has a dead zone; rANS has static tables. Shapes: B samples, C channels, H rows, W
columns, K live PCA components, J classes of bands, n coded coefficients.
"""

import functools
import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.codec.rans import TABLE_BITS, TABLE_SIZE, RansCoder, rans_coder
from dtcache.codec.tap_codec import CONTRADICTION, Bands, have_types
from dtcache.errors import CodecError
from dtcache.whitening import square_norms

DEAD = 255
"""Class of a coefficient that is never coded."""
INT16_LIMIT = 32767
ROUNDING = 0.42
"""Added before the floor. A value below 0.5 widens the dead zone (design: codec)."""
ARRAY_TYPES = {
    "basis": (np.float16, 2),
    "mean": (np.float16, 1),
    "classes": (np.uint8, 3),
    "class_step": (np.float32, 1),
    "class_gain": (np.float32, 1),
    "class_table": (np.uint8, 1),
    "tables": (np.uint16, 2),
    "half_width": (np.uint8, 1),
}
"""Dtype and number of axes of each fitted array.

Compiled decoders index by these arrays without bounds checks, and a cache's own zarr.json sets the
dtypes that are read. So a signed dtype must be refused.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedTap:
    """The fit of one tap: K live PCA components, J classes of bands, T tables of A symbols."""

    basis: NDArray[np.float16]
    """(C, K): PCA components as columns, by falling variance."""
    mean: NDArray[np.float16]
    """(C,): channel means of the whitened features."""
    classes: NDArray[np.uint8]
    """(K, H, W): class of each DCT coefficient, 255 if it is dropped; the coding order is by class.
    """
    class_step: NDArray[np.float32]
    """(J,): quantiser step."""
    class_gain: NDArray[np.float32]
    """(J,): symbol x step x gain is the reconstruction; the gain undoes the dead zone's shrinkage.
    """
    class_table: NDArray[np.uint8]
    """(J,): index of the probability table that codes the class."""
    tables: NDArray[np.uint16]
    """(T, A): symbol frequencies; each row sums to 2048.

    Symbol s means the value s - half_width; the last symbol is an escape.
    """
    half_width: NDArray[np.uint8]
    """(T,): table t codes the values -half_width..half_width.

    Its symbol 2 half_width + 1 is the escape.
    """

    def __post_init__(self) -> None:
        """Check every dtype and bound that a decoder relies on. Raises CodecError."""
        if not (have_types(self.arrays(), ARRAY_TYPES) and self._agrees()):
            raise CodecError(CONTRADICTION)

    def _agrees(self) -> bool:
        """Return whether arrays of the right dtypes agree with each other."""
        channels, components = self.basis.shape
        tables, symbols = self.tables.shape
        checks = (
            self.mean.shape == (channels,)
            and components <= channels
            and len(self.classes) == components,
            bool((self.classes[self.classes != DEAD] < len(self.class_step)).all()),
            len(self.class_step) == len(self.class_gain) == len(self.class_table),
            bool((self.class_table < tables).all()) and tables == len(self.half_width) <= DEAD,
            bool((self.tables.sum(1, dtype=np.int64) == TABLE_SIZE).all()),
            bool((2 * self.half_width.astype(np.int64) + 2 <= symbols).all()),
            all(
                bool(np.isfinite(a).all())
                for a in (self.basis, self.mean, self.class_step, self.class_gain)
            ),
        )
        return all(checks)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the tap's maps."""
        return len(self.mean), self.classes.shape[1], self.classes.shape[2]

    @property
    def live(self) -> NDArray[np.int64]:
        """(n,): flat (K, H, W) indices of the coded coefficients, in coding order."""
        flat = self.classes.reshape(-1)
        order = np.argsort(flat, kind="stable")
        return order[: int((flat != DEAD).sum())].astype(np.int64)

    @property
    def live_classes(self) -> NDArray[np.uint8]:
        """(n,): class of each coded coefficient, in coding order."""
        flat = self.classes.reshape(-1)
        return np.sort(flat[flat != DEAD])

    @property
    def section_bound(self) -> int:
        """Upper bound of the bytes per section, a multiple of 16.

        The bound counts the lane states, 16 bytes for what rANS loses by rounding, and 11 bits and
        a 16-bit escape per coefficient.
        """
        count = int((self.classes != DEAD).sum())
        bound = 32 + 2 * count + (count * TABLE_BITS + 7) // 8
        return -(-bound // 16) * 16

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def encoder(self) -> "Encoder":
        """Return the module from whitened features to quantised coefficients."""
        return Encoder(self)

    def decoder(self) -> "Decoder":
        """Return the module from quantised coefficients to whitened features."""
        return Decoder(self)

    def section_coder(self) -> RansCoder:
        """Return the entropy coder between int16 coefficients and sections."""
        return rans_coder(
            self.tables, self.half_width, self.class_table[self.live_classes], self.section_bound
        )

    def bands(self) -> Bands:
        """Return the bands' basis and quantiser steps."""
        live = self.classes != DEAD
        step_KHW = np.full(self.classes.shape, np.nan, np.float32)
        step_KHW[live] = self.class_step[self.classes[live]]
        return Bands(basis_CK=self.basis, step_KHW=step_KHW)

    def count_limits(self, values_N: NDArray[np.int16]) -> tuple[int, int]:
        """Return how many of the values (..., n) are +-32767, and how many are escapes.

        An escape is a value outside its class's table.
        """
        magnitude = np.abs(values_N.astype(np.int32))
        widest_N = self.half_width.astype(np.int32)[self.class_table[self.live_classes]]
        return int((magnitude >= INT16_LIMIT).sum()), int((magnitude > widest_N).sum())


def max_array_bytes(shape: tuple[int, int, int]) -> int:
    """Return an upper bound of the bytes of any fitted array of a tap whose maps are (C, H, W)."""
    channels, height, width = shape
    tables = DEAD * (2 * np.iinfo(np.uint8).max + 2)
    return max(2 * channels * channels, channels * height * width, 2 * tables)


def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal DCT-II, fp64 (size, size): coefficients = matrix @ signal."""
    k = torch.arange(size, dtype=torch.float64)[:, None]
    n = torch.arange(size, dtype=torch.float64)[None, :]
    matrix = torch.cos(math.pi * (2 * n + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def forward_transform(whitened_BCHW: Tensor, basis_CK: Tensor, mean_C: Tensor) -> Tensor:
    """Return fp32 DCT coefficients (B, K, H, W) of the PCA components of centred features."""
    height, width = whitened_BCHW.shape[2:]
    # A batched product reads channels-last maps, a convolution's natural output, without a copy.
    basis_BKC = basis_CK.T.expand(len(whitened_BCHW), -1, -1)
    components = torch.bmm(basis_BKC, whitened_BCHW.flatten(2)).view(
        len(whitened_BCHW), -1, height, width
    )
    rows_HH = _dct_on(height, whitened_BCHW.device)
    columns_WW = _dct_on(width, whitened_BCHW.device)
    coefficients = rows_HH @ (components @ columns_WW.T)
    # A constant has only the first coefficient, so this subtraction centres the features.
    coefficients[:, :, 0, 0] -= math.sqrt(height * width) * (mean_C @ basis_CK)
    return coefficients


@functools.cache
def _dct_on(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return dct_matrix(size).float().to(device)


class Encoder(nn.Module):
    """Whitened features to quantised coefficients, with squared error and energy."""

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
        classes = torch.from_numpy(fitted.live_classes).long()
        self.register_buffer("live_N", live)
        self.register_buffer("step_N", torch.from_numpy(fitted.class_step)[classes])
        self.register_buffer("gain_N", torch.from_numpy(fitted.class_gain)[classes])
        norms_K = basis_CK.double().square().sum(0).float()
        self.register_buffer(
            "norm_N", norms_K[live // (fitted.classes.shape[1] * fitted.classes.shape[2])]
        )

    def forward(self, whitened_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values (B, n) int16, and squared error and energy, both fp64 (B,).

        Energy is measured about the channel means. The error is |x - B c|^2 with decoded
        coefficients c and the stored basis B. The DCT is orthonormal, so the error is computed on
        coefficients. B, rounded to fp16, is not exactly orthonormal: the computation includes the
        lengths of its columns, but not their remaining angles (1e-4), because components are
        uncorrelated over the data set.
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
    """Return |x - mean|^2 of each sample, fp64 (B,)."""
    mean = mean_C.double()
    sum_BC = whitened_BCHW.flatten(2).sum(2).double()
    return (
        square_norms(whitened_BCHW)
        - 2 * sum_BC @ mean
        + whitened_BCHW[0, 0].numel() * mean.square().sum()
    )


def quantise(coefficients: Tensor, step: Tensor) -> Tensor:
    """Quantise with a dead zone (rounding offset 0.42): signed integers as fp32 within +-32767."""
    scaled = coefficients / step
    return (scaled.sign() * (scaled.abs() + ROUNDING).floor()).clamp(-INT16_LIMIT, INT16_LIMIT)


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
        classes = torch.from_numpy(fitted.live_classes).long()
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
        """Return whitened features, fp32 (B, C, H, W), from int16 values (B, n).

        Autocast is off, because reduced precision would round the targets.
        """
        with torch.autocast(values_BN.device.type, enabled=False):
            count = len(values_BN)
            dense = self.scale_N.new_zeros(count, self.components * self.height * self.width)
            dense.index_copy_(1, self.live_N, values_BN * self.scale_N)
            # Channels last, like the student's maps: the loss then reads both in one order.
            maps = dense.view(count, self.components, self.height * self.width).mT @ self.basis_CK.T
            maps = self.rows_HH.T @ maps.view(count, self.height, -1)
            maps = self.columns_WW.T @ maps.view(count * self.height, self.width, -1)
            maps = (maps + self.mean_C).view(count, self.height, self.width, -1)
            return maps.permute(0, 3, 1, 2)
