"""Batches of cached samples, as a loader yields them: entropy-decoded on the host, not yet dequantised.

Shape suffixes: B batch, C channels, H rows, W columns, N coefficients.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelBatch:
    """The soft labels of one batch, entropy-decoded; a LabelDecoder turns them into logits."""

    coefficients_BN: Tensor
    """int16: of all views of each row."""
    scalars_B2: Tensor
    """fp32 sigma and mu: raw = whitened * sigma + mu."""
    views_B: Tensor
    """int64: the view that the batch shows of each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """One batch, entropy-decoded; a FeatureDecoder turns its coefficients into targets."""

    rows: Rows
    """(B,): rows of the cache."""
    images_BCHW: Tensor
    """uint8 RGB; already mirrored where the view is."""
    coefficients: dict[str, Tensor]
    """(B, n) by array: int16, or fp16 where features are stored so. Online: the whitened maps, fp32 (B, C, H, W)."""
    scalars: dict[str, Tensor]
    """(B, 2) fp32 sigma and mu by array: raw = whitened * sigma + mu."""
    labels: LabelBatch | None = None
    """Where the training asks for them."""

    def changed(self, change: Callable[[Tensor], Tensor]) -> "TrainBatch":
        """Return the batch with the same change made to every tensor."""
        return TrainBatch(
            rows=self.rows,
            images_BCHW=change(self.images_BCHW),
            coefficients={name: change(values) for name, values in self.coefficients.items()},
            scalars={name: change(values) for name, values in self.scalars.items()},
            labels=self.labels
            and LabelBatch(
                **{f.name: change(getattr(self.labels, f.name)) for f in fields(self.labels)}
            ),
        )
