"""The protocol that every codec of a tap implements, and the checks that all codecs share.

Shapes: B samples, C channels, H rows, W columns, K PCA components, n stored values per sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dtcache.payloads import Payloads

CONTRADICTION = (
    "the fitted codec arrays contradict each other; the cache is damaged: run the extraction again"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bands:
    """The frequency bands of a transform codec: one DCT coefficient of one PCA component each."""

    basis_CK: NDArray[np.float16]
    """PCA components as columns."""
    step_KHW: NDArray[np.float32]
    """Quantiser step of each band; NaN if the codec drops the band."""


class SectionCoder(Protocol):
    """The lossless half of a codec, on the host: values to sections of payloads and back."""

    def pack(self, values_N: NDArray[Any], mu: float, sigma: float) -> bytes:
        """Return the section of one sample: its values (n,) and its two whitening scalars.

        It has a whole number of 16-bit words.
        """

    def unpack(self, sections: Payloads) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Return values (B, n) and (sigma, mu) pairs (B, 2).

        Raises PayloadError if a section is damaged.
        """


class TapCodec(Protocol):
    """The codec of one tap, fitted to a data set: small arrays that the cache stores."""

    @property
    def mean(self) -> NDArray[np.float16]:
        """(C,): channel means of the whitened features."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the tap's maps."""

    @property
    def section_bound(self) -> int:
        """Upper bound of the bytes per section, a multiple of 16."""

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the fitted arrays by field name, as the store keeps them."""

    def encoder(self) -> nn.Module:
        """Return a module from whitened features (B, C, H, W) to values, squared error and energy.

        Values are (B, n); error and energy are fp64 (B,).
        """

    def decoder(self) -> nn.Module:
        """Return a module from values (B, n) to whitened features, fp32 (B, C, H, W)."""

    def section_coder(self) -> SectionCoder:
        """Return the coder between values and sections."""

    def bands(self) -> Bands | None:
        """Return the codec's frequency bands, or None if it stores features without a transform."""

    def count_limits(self, values_N: NDArray[Any]) -> tuple[int, int]:
        """Return two counts of the values (..., n): at the limit of their dtype, and escapes."""


def have_types(
    arrays: Mapping[str, NDArray[np.generic]], types: Mapping[str, tuple[type, int]]
) -> bool:
    """Return whether each array has the dtype and the number of axes that `types` gives.

    Dtypes are in native byte order.
    """
    return all(
        (arrays[name].dtype, arrays[name].ndim) == (np.dtype(dtype), axes)
        for name, (dtype, axes) in types.items()
    )
