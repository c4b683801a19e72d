"""Which part of an error lies in bands that are noise: squared errors weighed in the codec's own transform."""

import numpy as np
import torch
from torch import Tensor, nn

from dtcache.codec.pca_dct import forward_transform
from dtcache.codec.tap_codec import DEAD, FittedTap

LEAST_WEIGHT = 2.0**-3
"""Of a band, and of a tap: the share that the fit tells from none (its steps grow to 8 times: `fit.MAX_LEVEL`)."""


class DeterminedBands(nn.Module):
    """A mean squared error in which each band counts by the share of it that the image determines, not the noise.

    A fit made for students keeps that share: a band's step is the global step over it, in half octaves. Bands that the
    codec dropped count in full: their target is their mean, which holds no noise.
    """

    basis_CK: Tensor
    noise_KHW: Tensor
    zero_C: Tensor

    def __init__(self, fitted: FittedTap, step: float) -> None:
        """Weigh as `fitted` says, whose finest bands have the quantiser step `step`."""
        super().__init__()
        share_J = np.clip(step / fitted.class_step.astype(np.float64), LEAST_WEIGHT, 1.0)
        live = fitted.classes != DEAD
        noise_KHW = np.zeros(fitted.classes.shape, np.float32)
        noise_KHW[live] = 1.0 - share_J[fitted.classes[live]]
        self.register_buffer("basis_CK", torch.from_numpy(fitted.basis).float())
        self.register_buffer("noise_KHW", torch.from_numpy(noise_KHW))
        self.register_buffer("zero_C", torch.zeros(len(fitted.mean)))

    def forward(self, error_BCHW: Tensor) -> Tensor:
        """Return the weighed mean square of fp32 errors of whitened features, a scalar.

        The transform is orthonormal, so that the bands' part is taken off the whole: mean(e^2) - sum (1 - w) c^2 / n.
        """
        with torch.autocast(error_BCHW.device.type, enabled=False):
            error_BCHW = error_BCHW.float()
            bands_BKHW = forward_transform(error_BCHW, self.basis_CK, self.zero_C)
            in_noise = (self.noise_KHW * bands_BKHW.square()).sum()
            return error_BCHW.square().mean() - in_noise / error_BCHW.numel()
