"""The logits of all views of an image as one map, and their decoding.

Views of an image have similar logits, so coded together they take fewer bytes.

Shapes: B batch, V views, K classes, H rows, W columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dtcache.codec import FeatureDecoder, TapCodec
from dtcache.whitening import unwhiten

ONLY = "logits"


def join_views(logits_BVKHW: Tensor, mirrored: Sequence[bool]) -> Tensor:
    """Return (B, V x K, H, W): the views concatenated over channels.

    Views whose entry in `mirrored` is true are mirrored back, so that all views align.
    """
    views = [
        x.flip(3) if flip else x for x, flip in zip(logits_BVKHW.unbind(1), mirrored, strict=True)
    ]
    return torch.cat(views, 1)


class LabelDecoder(nn.Module):
    """Decodes coefficients to logits on the student's device."""

    mirrored_V: Tensor

    def __init__(self, fitted: TapCodec, mirrored: Sequence[bool]) -> None:
        """Decode maps of `join_views`; `mirrored` has one entry per view."""
        super().__init__()
        self._decoder = FeatureDecoder({ONLY: fitted})
        self.register_buffer("mirrored_V", torch.tensor(list(mirrored)))

    def forward(self, coefficients_BN: Tensor, scalars_B2: Tensor) -> Tensor:
        """Return the logits of every view, fp32 (B, V, K, H, W), in the view's own orientation."""
        joined = unwhiten(self._decoder({ONLY: coefficients_BN})[ONLY], scalars_B2)
        views = joined.view(len(joined), len(self.mirrored_V), -1, *joined.shape[2:])
        return torch.where(self.mirrored_V[:, None, None, None], views.flip(4), views)

    def chosen(self, coefficients_BN: Tensor, scalars_B2: Tensor, views_B: Tensor) -> Tensor:
        """Return the logits of view `views_B` of each row, fp32 (B, K, H, W)."""
        views = self(coefficients_BN, scalars_B2)
        chosen: Tensor = views[torch.arange(len(views), device=views.device), views_B]
        return chosen
