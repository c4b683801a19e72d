"""The losses of feature distillation, pure functions in fp32. Shapes: B batch, C channels, H rows, W columns."""

import torch
from torch import Tensor

from dtcache.codec.pca_dct import WHITEN_EPS

EPS = 1e-12
"""Under every root, so that its gradient exists where the argument is zero."""


def mse_loss(predicted_BCHW: Tensor, whitened_BCHW: Tensor) -> Tensor:
    """Return the mean squared error against the whitened teacher feature (paper: MSE, mean over elements), a scalar."""
    return (predicted_BCHW.float() - whitened_BCHW.float()).square().mean()


def attention_map(feature_BCHW: Tensor) -> Tensor:
    """Return Q = vec(sum_c |A_c|^2), normalised to unit length a sample: fp32 (B, H * W) (paper: AT, p = 2)."""
    energy_BP = feature_BCHW.float().square().sum(1).flatten(1)
    return energy_BP / (energy_BP.square().sum(1, keepdim=True) + EPS).sqrt()


def at_loss(predicted_BCHW: Tensor, raw_BCHW: Tensor) -> Tensor:
    """Return the attention-transfer loss against the RAW teacher feature: the samples' mean distance of unit maps."""
    difference_BP = attention_map(predicted_BCHW) - attention_map(raw_BCHW)
    return (difference_BP.square().sum(1) + EPS).sqrt().mean()


def unwhiten(whitened_BCHW: Tensor, scalars_B2: Tensor) -> Tensor:
    """Return the raw feature from the whitened one and its (sigma, mu) pairs."""
    sigma_B, mu_B = scalars_B2.float().unbind(1)
    return torch.addcmul(mu_B[:, None, None, None], whitened_BCHW, sigma_B[:, None, None, None])


def whiten_positions(raw_BCHW: Tensor) -> Tensor:
    """Return fp32 features under a non-affine LayerNorm a position over C: the other reading of the paper's W.

    An ablation: every position then has the same energy, which the attention loss contradicts (design: losses).
    """
    centred_BCHW = raw_BCHW.float() - raw_BCHW.float().mean(1, keepdim=True)
    return centred_BCHW / (centred_BCHW.square().mean(1, keepdim=True) + WHITEN_EPS).sqrt()
