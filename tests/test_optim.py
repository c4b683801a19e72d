"""The optimizer, its parameter groups, its schedule and the EMA of weights."""

import copy
import re
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from timm.optim import param_groups_weight_decay
from torch import nn

from dtcache.optim import (
    Optimization,
    OptimizationSpec,
    parameter_groups,
    require_same_tensors,
    warmed_up_ema,
)


def small_vit() -> VisionTransformer:
    """Return a ViT with position embeddings, a class token and register tokens."""
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, reg_tokens=2, num_classes=3
    )


NETWORKS = {
    "vit": small_vit,
    # Its relative_position_bias_table lies deep in the network.
    "swin": lambda: SwinTransformer(
        img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=4
    ),
    # Its list has a pattern, and a submodule has a list that timm does not read.
    "xcit": lambda: Xcit(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2),
    "resnet": lambda: ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_decayed_as_in_timm(name: str) -> None:
    """A timm model inside a student has the groups of timm's own param_groups_weight_decay."""
    network = NETWORKS[name]()
    exempt = getattr(network, "no_weight_decay", set)()
    none, decay = param_groups_weight_decay(network, 0.1, no_weight_decay_list=exempt)
    student = nn.ModuleDict({"backbone": nn.ModuleDict({"model": network})})
    ours = parameter_groups(student, lr=1e-3, weight_decay=0.1)
    assert [group["weight_decay"] for group in ours] == [0.1, 0.0]
    for group, theirs in zip(ours, (decay, none), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in theirs["params"]]


def test_tokens_and_position_tables_keep_their_values_without_a_gradient() -> None:
    """A step with zero gradients shrinks the weights alone, also in modules that are not timm's."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.ones(1, 2, 3))
            self.cls_token = nn.Parameter(torch.ones(1, 1, 3))
            self.reg_token = nn.Parameter(torch.ones(1, 1, 3))
            self.relative_position_bias_table = nn.Parameter(torch.ones(4, 2))
            self.my_pos_embed_weight = nn.Parameter(torch.ones(2, 3))
            self.bias = nn.Parameter(torch.ones(3))

    network = nn.Sequential(nn.Identity(), Own())
    optimization = Optimization(
        network, OptimizationSpec(lr=0.5, weight_decay=0.1, total_steps=10, fused=False)
    )
    optimization.backward(sum(0 * p.sum() for p in network.parameters()))
    optimization.update(0)
    shrunk = {
        name
        for name, p in network.named_parameters()
        if not torch.equal(p, p.new_ones(()).expand_as(p))
    }
    assert shrunk == {"1.my_pos_embed_weight"}


def test_the_average_forgets_the_starting_weights() -> None:
    """The EMA's decay rises from a tenth to its limit, so that a short run forgets the start."""
    averaged = [torch.zeros(2)]
    expected = 0.0
    update = warmed_up_ema(0.9)
    for n in range(1, 200):
        update(averaged, [torch.full((2,), float(n))], torch.tensor(n))
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        torch.testing.assert_close(averaged[0], torch.full((2,), expected), rtol=1e-4, atol=1e-4)
    assert expected > 185


@pytest.mark.parametrize("change", ["grouping", "order"])
def test_a_state_of_other_groups_is_refused(change: str) -> None:
    """A checkpoint whose parameters were grouped or ordered otherwise is not loaded silently."""
    spec = OptimizationSpec(lr=0.1, weight_decay=0.1, total_steps=10, fused=False)
    saved = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    now = {
        "grouping": nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)),
        "order": nn.Sequential(nn.Linear(3, 3), nn.Linear(2, 3)),
    }[change]
    before = Optimization(saved, spec)
    before.backward(saved(torch.ones(1, 2)).sum())
    before.update(0)
    with pytest.raises(
        ValueError, match=r"groups have other parameters|of parameter \d: expected the shape"
    ):
        Optimization(now, spec).load_state_dict(before.state_dict())


def _set(state: dict[str, Any], path: str, value: Any) -> None:
    """Replace an entry of a nested state; a number in the path is an index."""
    *folders, last = [int(name) if name.isdecimal() else name for name in path.split(".")]
    inner: Any = state
    for name in folders:
        inner = inner[name]
    inner[last] = value


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("optimizer.state.0.exp_avg", torch.zeros(()).expand(1 << 40), "expected the shape [2, 3]"),
        ("optimizer.state.0.exp_avg", torch.full((2, 3), float("nan")), "expected finite values"),
        ("optimizer.state.0.exp_avg", torch.zeros(2, 3, dtype=torch.int64), "floating point"),
        ("optimizer.state.0.exp_avg", "x", "expected a tensor, got str"),
        ("optimizer.state.0.step", torch.tensor(-1.0), "expected 1 or more, got -1.0"),
        ("optimizer.state.0", {"step": torch.tensor(1.0)}, "missing or unknown"),
        ("optimizer.state.7", {}, "parameter 7 is unknown"),
        ("optimizer.param_groups.0.params", [1], "its groups have other parameters"),
        ("average.n_averaged", torch.tensor(-1), "its number of updates is negative"),
        ("average.n_averaged", torch.tensor(1.0), "expected torch.int64, got torch.float32"),
        ("average", {}, "average: missing or unknown"),
    ],
)
def test_a_state_that_training_cannot_produce_is_refused(
    path: str, value: Any, reason: str
) -> None:
    """A misshapen, mistyped, missing or non-finite entry is refused, and nothing is loaded."""
    network = nn.Linear(3, 2)
    optimization = Optimization(network, OptimizationSpec(lr=0.1, total_steps=9, ema_decay=0.9))
    optimization.backward(network(torch.ones(1, 3)).sum())
    optimization.update(0)
    state = copy.deepcopy(optimization.state_dict())
    optimization.load_state_dict(state)
    before = copy.deepcopy(optimization.state_dict()["optimizer"]["state"])
    _set(state, path, value)
    with pytest.raises((ValueError, TypeError), match=re.escape(reason)):
        optimization.load_state_dict(state)
    after = optimization.state_dict()["optimizer"]["state"]
    assert all(torch.equal(before[i][name], after[i][name]) for i in before for name in before[i])


def test_a_state_sets_no_hyperparameter() -> None:
    """The decay, the betas and the direction of a step are those of the spec, not of a file."""
    network = nn.Linear(3, 2)
    spec = OptimizationSpec(lr=0.1, total_steps=9, weight_decay=0.1)
    optimization = Optimization(network, spec)
    expected = copy.deepcopy(optimization.state_dict()["optimizer"]["param_groups"])
    state = copy.deepcopy(optimization.state_dict())
    state["optimizer"]["param_groups"][0] |= {"maximize": True, "weight_decay": 9.0, "betas": "x"}
    optimization.load_state_dict(state)
    assert optimization.state_dict()["optimizer"]["param_groups"] == expected


@pytest.mark.parametrize(
    ("got", "reason"),
    [
        ({}, "student: missing or unknown: bias, weight"),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)},
            "student: bias: expected the shape",
        ),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2).half()}, "expected torch.float32"),
        ({"weight": torch.zeros(2, 3), "bias": [0.0, 0.0]}, "expected a tensor, got list"),
    ],
)
def test_other_weights_are_refused_by_name(got: dict[str, Any], reason: str) -> None:
    """Weights of other names, shapes, dtypes or types are refused; equal ones pass."""
    own = nn.Linear(3, 2).state_dict()
    require_same_tensors("student", own, own)
    with pytest.raises((ValueError, TypeError), match=re.escape(reason)):
        require_same_tensors("student", own, got)


def test_the_decays_of_the_1x_schedule() -> None:
    """After a linear warm-up the rate is the peak, a tenth after 2/3, a hundredth after 11/12."""
    spec = OptimizationSpec(lr=1.0, warmup_steps=2, total_steps=12, decays=(2 / 3, 11 / 12))
    factors = [spec.lr_factor(step) for step in range(12)]
    assert factors == pytest.approx([0.5, 1, *[1] * 6, *[0.1] * 3, 0.01])
