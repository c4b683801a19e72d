"""Batches of cached samples, as a loader yields them: entropy-decoded, not yet dequantised.

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
    """The soft labels of one batch, entropy-decoded. A LabelDecoder turns them into logits."""

    coefficients_BN: Tensor
    """int16: the coefficients of all views of each row."""
    scalars_B2: Tensor
    """fp32 (sigma, mu): raw = whitened * sigma + mu."""
    views_B: Tensor
    """int64: the view of each row that the batch shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """One batch, entropy-decoded. A FeatureDecoder turns its coefficients into targets."""

    rows: Rows
    """(B,) int64: rows of the cache."""
    images_BCHW: Tensor
    """uint8 RGB, mirrored if the view is."""
    coefficients: dict[str, Tensor]
    """By array: int16 (B, N), or fp16 for float16 features.

    If a teacher runs in the loop: its features by array, fp32 (B, C, H, W).
    """
    scalars: dict[str, Tensor]
    """By array: fp32 (B, 2), (sigma, mu): raw = whitened * sigma + mu."""
    labels: LabelBatch | None = None
    """Soft labels, if they are distilled too."""

    def changed(self, change: Callable[[Tensor], Tensor]) -> "TrainBatch":
        """Return the batch with `change` applied to every tensor."""
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
