"""The regressor assigns taps to levels and implements the pyramids of the papers."""

import hashlib

import numpy as np
import pytest
import torch
from student.reference import Reference

from dtcache.student.blocks import BottomUp, NonLocal, PyramidPooling
from dtcache.student.regressor import FeatureRegressor

CHANNELS = (8, 16, 32, 64)
GRIDS = ((32, 32), (16, 16), (8, 8), (4, 4))


def maps() -> list[torch.Tensor]:
    """Random maps of a backbone at 128 px."""
    return [torch.randn(2, c, *grid) for c, grid in zip(CHANNELS, GRIDS, strict=True)]


def shaken(regressor: FeatureRegressor) -> FeatureRegressor:
    """Give every weight and statistic a random value, so that no initial value hides an error."""
    generator = torch.Generator().manual_seed(1)
    for name, value in regressor.state_dict().items():
        if value.is_floating_point():
            value.copy_(
                0.4 * torch.randn(value.shape, generator=generator) + (1.5 if "var" in name else 0)
            )
            value.abs_() if "var" in name else value
    return regressor.eval()


@pytest.mark.parametrize("kind", ["fpn", "fpn-attention", "pafpn", "fpn-ppm"])
def test_every_kind_is_its_papers_formula(kind: str) -> None:
    """Each kind's predictions equal a NumPy implementation on a pyramid with uneven steps."""
    grids = ((9, 14), (5, 7), (3, 4))
    channels = (3, 4, 5)
    targets = {"fine": (2, 9, 14), "coarse": (3, 3, 4)}
    regressor = shaken(FeatureRegressor(channels, grids, targets, 6, kind))
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((2, c, *grid)) for c, grid in zip(channels, grids, strict=True)]
    state = {name: value.double().numpy() for name, value in regressor.state_dict().items()}
    expected = Reference(state, kind)(xs, {"fine": 0, "coarse": 2})
    with torch.no_grad():
        found = regressor([torch.from_numpy(x).float() for x in xs])
    for name, wanted in expected.items():
        assert float(np.abs(wanted).max()) > 0.1
        np.testing.assert_allclose(
            found[name], wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max())
        )


def test_the_default_regressor_stays_what_it_was() -> None:
    """The names, order and random weights of the default regressor fpn-ppm never change."""
    torch.manual_seed(0)
    regressor = FeatureRegressor(CHANNELS, GRIDS, {"a": (5, 16, 16), "b": (3, 2, 2)}, 16)
    items = regressor.state_dict().items()
    assert next(iter(items))[0] == "pooling.branches.0.0.weight"
    digest = hashlib.sha256("".join(f"{k}{tuple(v.shape)}" for k, v in items).encode()).hexdigest()
    assert digest[:16] == "bd7371cee0bbb648"
    assert float(regressor.heads[0].weight[0, 0, 0, 0].detach()) == pytest.approx(
        -0.0161950, rel=1e-5
    )


def test_attention_starts_as_the_identity_and_then_sees_the_whole_map() -> None:
    """Attention is the identity at first; later a corner affects the opposite corner."""
    block = NonLocal(8).eval()
    x = torch.randn(1, 8, 5, 6)
    assert torch.equal(block(x), x)
    torch.nn.init.ones_(block.out[1].weight)
    changed = x.clone()
    changed[..., 0, 0] += 3
    assert not torch.allclose(block(x)[..., -1, -1], block(changed)[..., -1, -1])


def test_the_bottom_up_branch_starts_at_the_finest_level() -> None:
    """In PaFPN the finest map affects the coarsest prediction, which it does not in FPN."""
    targets = {"a": (5, 4, 4)}
    xs = maps()
    changed = maps()
    changed[1:] = xs[1:]
    for kind, reaches in (("fpn", False), ("pafpn", True)):
        regressor = FeatureRegressor(CHANNELS, GRIDS, targets, 16, kind).eval()
        assert torch.equal(regressor(xs)["a"], regressor(changed)["a"]) is not reaches
        assert list(regressor.smooth) == (["0", "1", "2", "3"] if reaches else ["3"])
    levels = [torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4)]
    assert BottomUp(2, 4).eval()(levels)[0] is levels[0]


@pytest.mark.parametrize("kind", ["fpn", "fpn-attention", "pafpn"])
def test_every_kind_serves_coarser_taps(kind: str) -> None:
    """Under every kind, levels pooled below the backbone's coarsest serve 2x2 and 1x1 taps."""
    regressor = FeatureRegressor(CHANNELS, GRIDS, {"a": (5, 2, 2), "b": (5, 1, 1)}, 16, kind)
    assert [tuple(p.shape[1:]) for p in regressor(maps()).values()] == [(5, 2, 2), (5, 1, 1)]


def test_each_tap_gets_a_head_on_the_level_of_its_grid() -> None:
    """Taps on the four grids use the four levels, and predictions have the teacher's shapes."""
    targets = {f"tap{i}": (5 + i, *grid) for i, grid in enumerate(GRIDS)}
    regressor = FeatureRegressor(CHANNELS, GRIDS, targets, width=16)
    assert regressor.level_of == {"tap0": 0, "tap1": 1, "tap2": 2, "tap3": 3}
    assert regressor.resized == []
    assert {name: tuple(p.shape[1:]) for name, p in regressor(maps()).items()} == targets


def test_two_timesteps_of_one_tap_share_a_level_but_not_a_head() -> None:
    """Every (tap, timestep) has its own 1x1 head."""
    regressor = FeatureRegressor(
        CHANNELS, GRIDS, {"t50/a": (5, 8, 8), "t150/a": (5, 8, 8)}, width=16
    )
    first, second = regressor(maps()).values()
    assert list(regressor.smooth) == ["2"]
    assert not torch.equal(first, second)


def test_a_coarser_tap_gets_an_extra_pooled_level() -> None:
    """A tap coarser than all levels gets an extra pooled level of exactly its grid."""
    regressor = FeatureRegressor(CHANNELS, GRIDS, {"a": (5, 2, 2), "b": (5, 1, 1)}, width=16)
    assert regressor.level_of == {"a": 4, "b": 5}
    assert regressor.resized == []
    assert [tuple(p.shape[1:]) for p in regressor(maps()).values()] == [(5, 2, 2), (5, 1, 1)]


def test_a_grid_that_no_level_has_is_resized_and_named() -> None:
    """A tap on a grid of no level is predicted on the next finer level and resized bilinearly."""
    regressor = FeatureRegressor(
        CHANNELS, GRIDS, {"odd": (5, 12, 12), "even": (5, 16, 16)}, width=16
    )
    assert regressor.level_of == {"odd": 1, "even": 1}
    assert regressor.resized == ["odd"]
    assert regressor(maps())["odd"].shape == (2, 5, 12, 12)


def test_a_level_without_a_tap_has_no_weights() -> None:
    """Only levels with a target have a smoothing convolution and a head."""
    regressor = FeatureRegressor(CHANNELS, GRIDS, {"a": (5, 8, 8)}, width=16)
    assert list(regressor.smooth) == ["2"]
    assert len(regressor.heads) == 1


def test_the_pyramid_carries_the_coarsest_map_down() -> None:
    """A finest-level prediction depends on the coarsest map through the top-down path."""
    regressor = FeatureRegressor(CHANNELS, GRIDS, {"a": (5, 32, 32)}, width=16).eval()
    xs = maps()
    before = regressor(xs)["a"]
    after = regressor([*xs[:3], xs[3] + 1])["a"]
    assert not torch.allclose(before, after)


def test_the_top_down_path_is_the_fpns_sum() -> None:
    """Each level is its lateral map plus the enlarged level above."""
    regressor = FeatureRegressor(CHANNELS, GRIDS, {"a": (5, 16, 16)}, width=16).eval()
    xs = maps()
    level = regressor.pooling(xs[3])
    for i in (2, 1):
        size = xs[i].shape[2:]
        level = regressor.laterals[i](xs[i]) + torch.nn.functional.interpolate(
            level, size, mode="bilinear", align_corners=False
        )
    torch.testing.assert_close(regressor(xs)["a"], regressor.heads[0](regressor.smooth["1"](level)))


def test_pyramid_pooling_sees_the_whole_map() -> None:
    """With pyramid pooling, a change in one corner reaches the opposite corner."""
    pooling = PyramidPooling(4, 8).eval()
    x = torch.randn(1, 4, 12, 12)
    changed = x.clone()
    changed[..., 0, 0] += 100
    assert not torch.allclose(pooling(x)[..., -1, -1], pooling(changed)[..., -1, -1])


@pytest.mark.parametrize("width", [8, 24])
def test_width_is_the_pyramids_width(width: int) -> None:
    """All levels have `width` channels."""
    regressor = FeatureRegressor(CHANNELS, GRIDS, {"a": (5, 8, 8)}, width=width)
    assert regressor.heads[0].in_channels == width
    assert {lateral[0].out_channels for lateral in regressor.laterals} == {width}
