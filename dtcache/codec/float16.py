"""Features without the transform codec: whitened, as float16, bytes regrouped by significance."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.codec.pca_dct import energy_about
from dtcache.codec.tap_codec import CONTRADICTION, are_of
from dtcache.errors import CodecError, PayloadError
from dtcache.payloads import Payloads
from dtcache.whitening import square_norms

HEADER_BYTES = 8
KINDS = {"mean": (np.float16, 1), "grid": (np.int32, 1)}
"""Type and number of axes of a tap's arrays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfTap:
    """What a float16 tap keeps of its fit: enough to know its shape and to measure errors about the mean."""

    mean: NDArray[np.float16]
    """(C,): channel means of the whitened features."""
    grid: NDArray[np.int32]
    """(2,): H and W."""

    def __post_init__(self) -> None:
        """Check every type and bound that a decoder relies on. Raises CodecError."""
        if not (are_of(self.arrays(), KINDS) and self.grid.shape == (2,) and self.grid.min() > 0):
            raise CodecError(CONTRADICTION)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the tap's maps."""
        return len(self.mean), int(self.grid[0]), int(self.grid[1])

    @property
    def payload_bound(self) -> int:
        """Bytes of a payload, every one alike, rounded up to a multiple of 16."""
        return -(-(HEADER_BYTES + 2 * int(np.prod(self.shape))) // 16) * 16

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class HalfEncoder(nn.Module):
    """Features to float16, with the squared error of the rounding and the energy about the channel means."""

    mean_C: Tensor

    def __init__(self, fitted: HalfTap) -> None:
        super().__init__()
        self.register_buffer("mean_C", torch.from_numpy(fitted.mean).float())

    def forward(self, whitened_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values (B, n) float16, squared error (B,) and energy (B,), both float64."""
        values_BCHW = whitened_BCHW.half()
        error_B = square_norms(whitened_BCHW - values_BCHW.float())
        return values_BCHW.flatten(1), error_B, energy_about(whitened_BCHW, self.mean_C)


def pack_half(values_N: NDArray[np.float16], mu: float, sigma: float) -> bytes:
    """Return a payload: sigma and mu (float32), the low bytes of all values, then the high bytes.

    High bytes alone repeat more than pairs of bytes do: zstd takes 10 to 20 % off.
    """
    planes = values_N.view(np.uint8).reshape(-1, 2).T
    return np.array([sigma, mu], "<f4").tobytes() + planes.tobytes()


def unpack_half(payloads: Payloads, count: int) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Return values (B, n) and (sigma, mu) pairs (B, 2) of payloads. Raises CodecError for a short one."""
    size = HEADER_BYTES + 2 * count
    short = np.flatnonzero(payloads.sizes < size)
    if len(short):
        got = payloads.sizes[short[0]]
        raise PayloadError(
            f"a payload has {got} bytes, too short for {count} float16 values", int(short[0])
        )
    values = np.empty((len(payloads), count), "<f2")
    scalars = np.empty((len(payloads), 2), "<f4")
    for place, payload in enumerate(payloads):
        scalars[place] = payload[:HEADER_BYTES].view("<f4")
        values[place].view(np.uint8).reshape(-1, 2)[:] = payload[HEADER_BYTES:size].reshape(2, -1).T
    return values, scalars


class HalfDecoder(nn.Module):
    """Stored float16 values to whitened features."""

    def __init__(self, fitted: HalfTap) -> None:
        super().__init__()
        self._shape = fitted.shape

    @torch.no_grad()
    def forward(self, values_BN: Tensor) -> Tensor:
        """Return whitened features, fp32 (B, C, H, W)."""
        return values_BN.float().view(-1, *self._shape)
