"""The paper's whitening W, applied to teacher features only, and its inverse.

W is LayerNorm without an affine transform. Per sample (over C, H and W) it keeps two scalars, so
that raw features can be restored: raw = whitened * sigma + mu. Per position (over C) it is an
ablation and cannot be undone. Pure functions. Shapes: B batch, C channels, H rows, W columns.
"""

import torch
from torch import Tensor

WHITEN_EPS = 1e-6
"""Added to the variance under the root."""


def whiten(raw_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whiten each sample over (C, H, W) (paper: W).

    Returns fp32 features (B, C, H, W), and mu and sigma, both fp32 (B,): raw = whitened * sigma +
    mu. sigma includes the epsilon.
    """
    raw_BCHW = raw_BCHW.float()
    count = raw_BCHW[0].numel()
    mu_B = raw_BCHW.sum((1, 2, 3)) / count
    centred_BCHW = raw_BCHW - mu_B[:, None, None, None]
    sigma_B = (square_norms(centred_BCHW) / count + WHITEN_EPS).sqrt().float()
    return centred_BCHW.div_(sigma_B[:, None, None, None]), mu_B, sigma_B


def unwhiten(whitened_BCHW: Tensor, scalars_B2: Tensor) -> Tensor:
    """Return raw features (B, C, H, W) from whitened ones and their (sigma, mu) pairs (B, 2)."""
    sigma_B, mu_B = scalars_B2.float().unbind(1)
    return torch.addcmul(mu_B[:, None, None, None], whitened_BCHW, sigma_B[:, None, None, None])


def whiten_positions(raw_BCHW: Tensor) -> Tensor:
    """Whiten each position over C: fp32 features (B, C, H, W).

    This is an alternative reading of the paper's W, for an ablation: every position then has the
    same energy, which contradicts the attention loss (design: losses).
    """
    centred_BCHW = raw_BCHW.float() - raw_BCHW.float().mean(1, keepdim=True)
    return centred_BCHW / (centred_BCHW.square().mean(1, keepdim=True) + WHITEN_EPS).sqrt()


def square_norms(maps_BCHW: Tensor) -> Tensor:
    """Return |x|^2 of each sample, fp64 (B,), summed in fp64.

    Maps in either memory order, channels first or last, are read without a copy.
    """
    if not maps_BCHW.is_contiguous():
        maps_BCHW = maps_BCHW.permute(0, 2, 3, 1)
    norms_B: Tensor = torch.linalg.vector_norm(maps_BCHW.flatten(1), dim=1, dtype=torch.float64)
    return norms_B.square()
