"""The fitted numbers of one tap's codec: what the store keeps and a decoder needs."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from dtcache.errors import CodecError

DEAD = 255
"""Class of a coefficient that is never coded."""
TABLE_BITS = 11
TABLE_SIZE = 1 << TABLE_BITS
MAX_HALF_WIDTH = 127
KINDS = {
    "basis": (np.float16, 2),
    "mean": (np.float16, 1),
    "classes": (np.uint8, 3),
    "class_step": (np.float32, 1),
    "class_gain": (np.float32, 1),
    "class_table": (np.uint8, 1),
    "tables": (np.uint16, 2),
    "half_width": (np.uint8, 1),
}
"""Type and number of axes of a tap's arrays. Compiled decoders index by them without looking: no type with a sign may
pass, and a cache's own zarr.json says what it brings."""
CONTRADICTION = (
    "the fitted codec arrays contradict each other; the cache is damaged: run the extraction again"
)


def are_of(
    arrays: Mapping[str, NDArray[np.generic]], kinds: Mapping[str, tuple[type, int]]
) -> bool:
    """Return whether each array has the type, in native byte order, and the number of axes that `kinds` names."""
    return all(
        (arrays[name].dtype, arrays[name].ndim) == (np.dtype(kind), axes)
        for name, (kind, axes) in kinds.items()
    )


def most_bytes(shape: tuple[int, int, int]) -> int:
    """Return an upper bound of the bytes of any array that is fitted to a tap whose maps are (C, H, W)."""
    channels, height, width = shape
    tables = DEAD * (2 * np.iinfo(np.uint8).max + 2)
    return max(2 * channels * channels, channels * height * width, 2 * tables)


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedTap:
    """K live components of C channels; J classes of bands; T probability tables of A symbols each."""

    basis: NDArray[np.float16]
    """(C, K): PCA components as columns, by falling variance."""
    mean: NDArray[np.float16]
    """(C,): channel means of the whitened features."""
    classes: NDArray[np.uint8]
    """(K, H, W): class of each DCT coefficient, or 255 where it is dropped. Coefficients are coded by rising class."""
    class_step: NDArray[np.float32]
    """(J,): quantiser step."""
    class_gain: NDArray[np.float32]
    """(J,): reconstruction is symbol x step x gain; the gain undoes the dead zone's shrinkage."""
    class_table: NDArray[np.uint8]
    """(J,): which probability table codes the class."""
    tables: NDArray[np.uint16]
    """(T, A): symbol frequencies, each row summing to 2048; symbol s means value s - half_width, the last an escape."""
    half_width: NDArray[np.uint8]
    """(T,): table t codes the values -half_width..half_width and, as symbol 2 half_width + 1, an escape."""

    def __post_init__(self) -> None:
        """Check every type and bound that a decoder relies on. Raises CodecError."""
        if not (are_of(self.arrays(), KINDS) and self._agrees()):
            raise CodecError(CONTRADICTION)

    def _agrees(self) -> bool:
        """Return whether arrays of the right types agree with each other."""
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
        """(n,): flat (K, H, W) positions of the coded coefficients, in coding order."""
        flat = self.classes.reshape(-1)
        order = np.argsort(flat, kind="stable")
        return order[: int((flat != DEAD).sum())].astype(np.int64)

    @property
    def payload_bound(self) -> int:
        """Upper bound of a payload's bytes: header, lane states, and 11 bits and a 16-bit escape a coefficient.

        Rounded up to a multiple of 16, so that rows of payloads are aligned words.
        """
        count = int((self.classes != DEAD).sum())
        bound = 32 + 2 * count + (count * TABLE_BITS + 7) // 8
        return -(-bound // 16) * 16

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
