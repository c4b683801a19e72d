"""The losses of label distillation: pure functions, computed in fp32.

Shapes: B batch, K classes, H rows, W columns, N pixels that are not ignored.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcache.losses.features import require_maps

DICE_WEIGHT = 3.0
"""The paper's weight of the Dice loss relative to the cross-entropy."""
TEMPERATURE = 4.0
"""The paper's temperature of the softmax, the same for teacher and student."""
SMOOTHING = 1.0
"""Pixels added to both parts of a Dice coefficient, which makes it 1 for a class in no mask."""


def cross_entropy(logits_BKHW: Tensor, classes_BHW: Tensor, ignore: int) -> Tensor:
    """Return the mean cross-entropy over the pixels that are not `ignore`, a scalar; 0 without any.

    Classes are integers (B, H, W); `ignore` is the ignore index.
    """
    kept_BHW = classes_BHW != ignore
    targets_BHW = torch.where(kept_BHW, classes_BHW, 0).long()
    losses_BHW = F.cross_entropy(logits_BKHW.float(), targets_BHW, reduction="none")
    return (losses_BHW * kept_BHW).sum() / kept_BHW.sum().clamp_min(1)


def dice_loss(logits_BKHW: Tensor, classes_BHW: Tensor, ignore: int) -> Tensor:
    """Return 1 - the mean over classes of the soft Dice coefficient, a scalar.

    The coefficient is (2 sum p y + 1) / (sum p + sum y + 1) with the softmax p and the one-hot
    truth y, summed over the batch's pixels that are not `ignore`. This is the coefficient of V-Net
    (Milletari, Navab and Ahmadi 2016), smoothed, with p and y unsquared in the denominator.
    """
    kept_BHW = classes_BHW != ignore
    p_KN = logits_BKHW.float().softmax(1).transpose(0, 1)[:, kept_BHW]
    y_KN = F.one_hot(classes_BHW[kept_BHW].long(), logits_BKHW.shape[1]).T.to(p_KN.dtype)
    overlap_K = 2 * (p_KN * y_KN).sum(1) + SMOOTHING
    return 1 - (overlap_K / (p_KN.sum(1) + y_KN.sum(1) + SMOOTHING)).mean()


def interpreter_loss(logits_BKHW: Tensor, classes_BHW: Tensor, ignore: int) -> Tensor:
    """Return cross-entropy + 3 x Dice loss of logits on the masks' grid, a scalar.

    The loss of the paper's feature interpreter.
    """
    return cross_entropy(logits_BKHW, classes_BHW, ignore) + DICE_WEIGHT * dice_loss(
        logits_BKHW, classes_BHW, ignore
    )


def label_loss(predicted_BKHW: Tensor, target_BKHW: Tensor) -> Tensor:
    """Return H(P_g, P_r) = -sum_k P_g log P_r, a scalar (paper: label distillation).

    The mean is over pixels. P_g is the softmax of the soft labels at temperature 4, P_r the softmax
    of the student's logits. There is no factor tau^2. Both are logits (B, K, H, W); raises
    ConfigError if their shapes differ.
    """
    require_maps(predicted_BKHW=predicted_BKHW, target_BKHW=target_BKHW)
    target = (target_BKHW.float() / TEMPERATURE).softmax(1)
    return -(target * (predicted_BKHW.float() / TEMPERATURE).log_softmax(1)).sum(1).mean()


def total_variation(first_BKHW: Tensor, second_BKHW: Tensor) -> Tensor:
    """Return sum_k |P - Q| / 2 per pixel, fp32 (B, H, W) in [0, 1].

    P and Q are the softmaxes at temperature 4.
    """
    first, second = ((x.float() / TEMPERATURE).softmax(1) for x in (first_BKHW, second_BKHW))
    return (first - second).abs().sum(1) / 2


def entropy(logits_BKHW: Tensor) -> Tensor:
    """Return the entropy per pixel of the softmax at temperature 1, in bits: fp32 (B, H, W)."""
    log_p = logits_BKHW.float().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1) / torch.log(torch.tensor(2.0))
