"""Batch normalisations of a network: their running statistics, and statistics over processes."""

from collections.abc import Iterable, Sequence

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtcache.student.backbone import Backbone


def fresh_batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Return the batch normalisations that have seen no batch: their statistics are still 0 and 1.

    The counter of batches alone is not enough: it loads as 0 if the saved weights lack it.
    """
    return [norm for norm in _batch_norms(network) if _is_fresh(norm)]


@torch.no_grad()
def recalibrate_batch_norm(
    backbone: Backbone, batches: Iterable[Tensor], norms: Sequence[_BatchNorm] | None = None
) -> None:
    """Set the running statistics of `norms` [default: all] to their averages over some batches.

    Batches are normalised images (B, 3, H, W). Only norms before the coarsest map change. All other
    modules stay in evaluation mode. Without batch normalisation no batch is read.
    """
    norms = _batch_norms(backbone) if norms is None else norms
    if not norms:
        return
    training = backbone.training
    momenta = [norm.momentum for norm in norms]
    backbone.eval()
    for norm in norms:
        # Without momentum PyTorch keeps a cumulative average, and the first batch replaces the old
        # statistics. A norm on which no map depends keeps its old statistics.
        norm.momentum = None
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()
        norm.train()
    try:
        for images_BCHW in batches:
            backbone.pooled(images_BCHW)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        backbone.train(training)


def synchronise_batch_norm(network: nn.Module) -> None:
    """Make batch normalisations, also timm's own, use statistics over all processes.

    CUDA only. Weights and their names stay the same.
    """
    convert_sync_batchnorm(network)


def _batch_norms(network: nn.Module) -> list[_BatchNorm]:
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _is_fresh(norm: _BatchNorm) -> bool:
    mean = norm.running_mean
    var = norm.running_var
    if mean is None or var is None:
        return False
    return not norm.num_batches_tracked and not mean.any() and bool((var == 1).all())
