"""The codec without a transform: float16 features, with bytes regrouped by significance.

Shapes: B samples, C channels, H rows, W columns, n = C x H x W values.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.codec.pca_dct import energy_about
from dtcache.codec.tap_codec import CONTRADICTION, have_types
from dtcache.errors import CodecError, PayloadError
from dtcache.payloads import Payloads
from dtcache.whitening import square_norms

HEADER_BYTES = 8
FLOAT16_LIMIT = 65504.0
ARRAY_TYPES = {"mean": (np.float16, 1), "grid": (np.int32, 1)}
"""Dtype and number of axes of each fitted array."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfTap:
    """The fit of one float16 tap: the shape of its maps and the channel means of its features."""

    mean: NDArray[np.float16]
    """(C,): channel means of the whitened features."""
    grid: NDArray[np.int32]
    """(2,): H and W."""

    def __post_init__(self) -> None:
        """Check every dtype and bound that a decoder relies on. Raises CodecError."""
        if not (
            have_types(self.arrays(), ARRAY_TYPES)
            and self.grid.shape == (2,)
            and self.grid.min() > 0
        ):
            raise CodecError(CONTRADICTION)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the tap's maps."""
        return len(self.mean), int(self.grid[0]), int(self.grid[1])

    @property
    def section_bound(self) -> int:
        """Bytes of every section, rounded up to a multiple of 16."""
        return -(-(HEADER_BYTES + 2 * int(np.prod(self.shape))) // 16) * 16

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def encoder(self) -> "HalfEncoder":
        """Return the module from whitened features to float16 values."""
        return HalfEncoder(self)

    def decoder(self) -> "HalfDecoder":
        """Return the module from float16 values to whitened features."""
        return HalfDecoder(self)

    def section_coder(self) -> "HalfCoder":
        """Return the coder between float16 values and sections."""
        return HalfCoder(count=int(np.prod(self.shape)))

    def bands(self) -> None:
        """Return None: features are stored without a transform."""

    def count_limits(self, values_N: NDArray[np.float16]) -> tuple[int, int]:
        """Return how many of the values (..., n) are at least 65504 in magnitude.

        The second number, of escapes, is always 0.
        """
        return int((np.abs(values_N.astype(np.float32)) >= FLOAT16_LIMIT).sum()), 0


class HalfEncoder(nn.Module):
    """Whitened features to float16, with the rounding's squared error and the features' energy."""

    mean_C: Tensor

    def __init__(self, fitted: HalfTap) -> None:
        super().__init__()
        self.register_buffer("mean_C", torch.from_numpy(fitted.mean).float())

    def forward(self, whitened_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values (B, n) fp16, and squared error and energy, both fp64 (B,).

        Energy is measured about the channel means.
        """
        values_BCHW = whitened_BCHW.half()
        error_B = square_norms(whitened_BCHW - values_BCHW.float())
        return values_BCHW.flatten(1), error_B, energy_about(whitened_BCHW, self.mean_C)


class HalfDecoder(nn.Module):
    """Stored float16 values to whitened features."""

    def __init__(self, fitted: HalfTap) -> None:
        super().__init__()
        self._shape = fitted.shape

    @torch.no_grad()
    def forward(self, values_BN: Tensor) -> Tensor:
        """Return whitened features, fp32 (B, C, H, W)."""
        return values_BN.float().view(-1, *self._shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfCoder:
    """Packs and unpacks sections of `count` float16 values.

    A section holds sigma and mu (fp32), then all low bytes, then all high bytes. High bytes in one
    run repeat more often than pairs of bytes do, so zstd saves 10 to 20 %.
    """

    count: int

    def pack(self, values_N: NDArray[np.float16], mu: float, sigma: float) -> bytes:
        """Return the section of one sample: its values (n,) and its two whitening scalars."""
        planes = values_N.view(np.uint8).reshape(-1, 2).T
        return np.array([sigma, mu], "<f4").tobytes() + planes.tobytes()

    def unpack(self, sections: Payloads) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """Return values (B, n) and (sigma, mu) pairs (B, 2).

        Raises PayloadError if a section is too short.
        """
        size = HEADER_BYTES + 2 * self.count
        short = np.flatnonzero(sections.sizes < size)
        if len(short):
            got = sections.sizes[short[0]]
            raise PayloadError(
                f"a section has {got} bytes, too short for {self.count} float16 values",
                int(short[0]),
            )
        values = np.empty((len(sections), self.count), "<f2")
        scalars = np.empty((len(sections), 2), "<f4")
        for i, section in enumerate(sections):
            scalars[i] = section[:HEADER_BYTES].view("<f4")
            planes = section[HEADER_BYTES:size].reshape(2, -1)
            values[i].view(np.uint8).reshape(-1, 2)[:] = planes.T
        return values, scalars
