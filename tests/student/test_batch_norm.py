"""Batch normalisations: recalibrated statistics, and statistics over processes."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dtcache.student import (
    Backbone,
    fresh_batch_norms,
    make_backbone,
    recalibrate_batch_norm,
    synchronise_batch_norm,
)


def images(count: int, height: int, width: int) -> Tensor:
    """Return normalised random images."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


class LinearNet(nn.Module):
    """A timm-like network: 1x1 convolution, dropout and two batch normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"architecture": "linear", "input_size": (3, 8, 8)}
        self.feature_info = [{"num_chs": 4, "reduction": 4}, {"num_chs": 4, "reduction": 8}]
        self.conv = nn.Conv2d(3, 4, 1)
        self.first = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.second = nn.BatchNorm2d(4, momentum=0.3)

    def forward_intermediates(self, x_BCHW: Tensor, **options: object) -> list[Tensor]:
        """Return the last map (B, 4, H, W)."""
        return [self.second(self.drop(self.first(self.conv(x_BCHW))))]


def linear_backbone() -> Backbone:
    """Return LinearNet as a backbone."""
    torch.manual_seed(0)
    return Backbone(LinearNet(), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_batch_norm_statistics_are_averages_over_batches() -> None:
    """Recalibrated running mean and variance are averages over batches; nothing else changes."""
    backbone = linear_backbone()
    net = backbone.model
    batches = [images(5, 8, 8) * 2 + 1, images(3, 8, 8) - 4, images(4, 8, 8) * 0.5]
    weight = net.conv.weight.detach().numpy()[:, :, 0, 0].copy()
    bias = net.conv.bias.detach().numpy().copy()
    backbone.train()
    recalibrate_batch_norm(backbone, batches)
    maps = [
        np.einsum("oc,bchw->obhw", weight, x.numpy()).reshape(4, -1) + bias[:, None]
        for x in batches
    ]
    np.testing.assert_allclose(
        net.first.running_mean, np.mean([m.mean(1) for m in maps], 0), rtol=1e-5
    )
    np.testing.assert_allclose(
        net.first.running_var, np.mean([m.var(1, ddof=1) for m in maps], 0), rtol=1e-5
    )
    # With batch statistics and without dropout, the second norm gets inputs of zero mean and unit
    # variance.
    np.testing.assert_allclose(net.second.running_mean, 0, atol=1e-5)
    np.testing.assert_allclose(net.second.running_var, 1, atol=1e-2)
    assert (net.first.momentum, net.second.momentum) == (0.1, 0.3)
    assert all(module.training for module in backbone.modules())
    assert fresh_batch_norms(backbone) == []
    np.testing.assert_array_equal(net.conv.weight.detach().numpy()[:, :, 0, 0], weight)


def test_only_the_named_batch_norms_are_recalibrated() -> None:
    """Only a fresh batch norm is recalibrated; a trained one keeps its statistics."""
    backbone = linear_backbone()
    net = backbone.model
    net.first.running_mean += 1
    net.first.num_batches_tracked += 7
    assert fresh_batch_norms(backbone) == [net.second]
    recalibrate_batch_norm(backbone.eval(), [images(5, 8, 8)], fresh_batch_norms(backbone))
    np.testing.assert_array_equal(net.first.running_mean, 1)
    assert int(net.first.num_batches_tracked) == 7
    assert float(net.second.running_mean.abs().min()) > 0.1
    assert not backbone.training


def test_a_network_without_batch_norm_draws_no_batch() -> None:
    """Recalibrating a network without batch norm (ConvNeXt) draws no batch."""
    backbone = make_backbone("convnext_atto", init=None, seed=3).eval()
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    recalibrate_batch_norm(backbone, (pytest.fail("a batch was drawn") for _ in range(1)))
    after = backbone.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_synchronised_batch_norms_keep_weights_and_names(name: str) -> None:
    """Each batch norm becomes a SyncBatchNorm; parameters, names and values stay the same."""
    backbone = make_backbone(name, init=None, seed=0)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    parameters = [id(p) for p in backbone.parameters()]
    synchronise_batch_norm(backbone)
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    assert [id(p) for p in backbone.parameters()] == parameters
    after = backbone.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
