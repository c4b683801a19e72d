"""The MSE in the codec's own transform, in which bands dominated by noise have less weight."""

import numpy as np
import torch
from torch import Tensor, nn

from dtcache.codec import Bands
from dtcache.codec.pca_dct import forward_transform

LEAST_WEIGHT = 2.0**-3
"""Least weight of a band and of a tap; `codec.fit.MAX_LEVEL` allows no smaller share."""


class DeterminedBands(nn.Module):
    """A mean squared error that weights each band by the share that the image determines.

    The rest of a band is noise. A codec fitted for students stores that share: a band's step is the
    global step over the share, in half octaves. Bands that the codec dropped have weight 1: their
    target is their mean, which contains no noise. Shapes: B batch, C channels, H rows, W columns, K
    components.
    """

    basis_CK: Tensor
    noise_KHW: Tensor
    zero_C: Tensor

    def __init__(self, bands: Bands, step: float) -> None:
        """Take the weights from a codec's bands and its global step: the finest bands' step."""
        super().__init__()
        share_KHW = np.clip(step / bands.step_KHW.astype(np.float64), LEAST_WEIGHT, 1.0)
        noise_KHW = np.nan_to_num(1.0 - share_KHW, nan=0.0).astype(np.float32)
        self.register_buffer("basis_CK", torch.from_numpy(bands.basis_CK).float())
        self.register_buffer("noise_KHW", torch.from_numpy(noise_KHW))
        self.register_buffer("zero_C", torch.zeros(len(bands.basis_CK)))

    def forward(self, error_BCHW: Tensor) -> Tensor:
        """Return the weighted mean square of errors of whitened features, an fp32 scalar.

        It is computed in fp32. The transform is orthonormal, so the mean is mean(e^2) - sum (1 - w)
        c^2 / n over coefficients c of weight w.
        """
        with torch.autocast(error_BCHW.device.type, enabled=False):
            error_BCHW = error_BCHW.float()
            bands_BKHW = forward_transform(error_BCHW, self.basis_CK, self.zero_C)
            in_noise = (self.noise_KHW * bands_BKHW.square()).sum()
            return error_BCHW.square().mean() - in_noise / error_BCHW.numel()
