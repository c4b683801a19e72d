"""The losses of feature distillation, pure functions in fp32. Shapes: B batch, C channels, H rows, W columns."""

from torch import Tensor

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
