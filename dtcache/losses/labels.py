"""The losses of label distillation, pure functions in fp32. Shapes: B batch, K classes, H rows, W columns."""

import torch
from torch import Tensor
from torch.nn import functional as F

DICE_WEIGHT = 3.0
"""The paper's weight of the Dice loss beside the cross-entropy."""
TEMPERATURE = 4.0
"""The paper's temperature of both softmaxes of the distillation."""
SMOOTHING = 1.0
"""In both parts of a Dice coefficient, in pixels, so that a class that neither side has counts as met."""


def cross_entropy(logits_BKHW: Tensor, classes_BHW: Tensor, ignore: int) -> Tensor:
    """Return the mean cross-entropy over the pixels that are not `ignore`, a scalar; 0 where there are none."""
    kept_BHW = classes_BHW != ignore
    targets_BHW = torch.where(kept_BHW, classes_BHW, 0).long()
    losses_BHW = F.cross_entropy(logits_BKHW.float(), targets_BHW, reduction="none")
    return (losses_BHW * kept_BHW).sum() / kept_BHW.sum().clamp_min(1)


def dice_loss(logits_BKHW: Tensor, classes_BHW: Tensor, ignore: int) -> Tensor:
    """Return 1 - the mean over classes of the soft Dice coefficient (2 sum p y + 1) / (sum p + sum y + 1), a scalar.

    p is the softmax, y the one-hot truth; sums run over the batch's pixels that are not `ignore` (Milletari, Navab and
    Ahmadi 2016, V-Net, with plain sums in the denominator, and smoothed).
    """
    kept_BHW = classes_BHW != ignore
    p_KN = logits_BKHW.float().softmax(1).transpose(0, 1)[:, kept_BHW]
    y_KN = F.one_hot(classes_BHW[kept_BHW].long(), logits_BKHW.shape[1]).T.to(p_KN.dtype)
    met_K = 2 * (p_KN * y_KN).sum(1) + SMOOTHING
    return 1 - (met_K / (p_KN.sum(1) + y_KN.sum(1) + SMOOTHING)).mean()


def interpreter_loss(logits_BKHW: Tensor, classes_BHW: Tensor, ignore: int) -> Tensor:
    """Return cross-entropy + 3 Dice of logits on the masks' grid, a scalar (paper: feature interpreter)."""
    return cross_entropy(logits_BKHW, classes_BHW, ignore) + DICE_WEIGHT * dice_loss(
        logits_BKHW, classes_BHW, ignore
    )


def label_loss(predicted_BKHW: Tensor, target_BKHW: Tensor) -> Tensor:
    """Return H(P_g, P_r) = -sum_k P_g log P_r of softmaxes at temperature 4, mean over pixels, a scalar.

    P_g are the soft labels, P_r the student's; without the factor tau^2 (paper: label distillation).
    """
    target = (target_BKHW.float() / TEMPERATURE).softmax(1)
    return -(target * (predicted_BKHW.float() / TEMPERATURE).log_softmax(1)).sum(1).mean()


def total_variation(first_BKHW: Tensor, second_BKHW: Tensor) -> Tensor:
    """Return sum_k |P - Q| / 2 of the softmaxes at temperature 4, a pixel: fp32 (B, H, W) in [0, 1]."""
    first, second = ((x.float() / TEMPERATURE).softmax(1) for x in (first_BKHW, second_BKHW))
    return (first - second).abs().sum(1) / 2


def entropy(logits_BKHW: Tensor) -> Tensor:
    """Return the entropy of the softmax (temperature 1) in bits, a pixel: fp32 (B, H, W)."""
    log_p = logits_BKHW.float().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1) / torch.log(torch.tensor(2.0))
