"""The interpreter's shapes, its saved folder and the features that it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dtcache.errors import CacheMismatchError, ConfigError, WeightsError
from dtcache.labels import (
    FeatureInterpreter,
    InterpreterSpec,
    load_interpreter,
    logit_grid,
    require_serves,
    save_interpreter,
)
from dtcache.recipe import Json, ViewSpec

VIEW = ViewSpec(height=32, width=48)
SHAPES = {"t50/stride8": (6, 4, 6), "t50/stride16": (10, 2, 3)}
TEACHER: Json = {
    "architecture": "UNet2DModel",
    "weights_sha256": "a" * 64,
    "config_sha256": "b" * 64,
    "ddim_steps": None,
    "condition": None,
}
RECIPE: Json = {
    "teacher": dict(TEACHER),
    "view": {"height": 32, "width": 48, "resize_mode": "crop"},
}
SPEC = InterpreterSpec(
    level="pixel",
    classes=("sky", "road", "car"),
    width=32,
    shapes=SHAPES,
    view=VIEW,
    teacher=TEACHER,
    validation=None,
)


def maps(count: int = 2) -> dict[str, torch.Tensor]:
    """Return random whitened maps."""
    torch.manual_seed(0)
    return {name: torch.randn(count, *shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("shapes", "grid"),
    [
        ({"t50/stride8": (6, 4, 6)}, (8, 12)),
        ({"t50/stride2": (6, 16, 24), "t50/stride8": (6, 4, 6)}, (16, 24)),
        ({"t50/stride4": (6, 8, 12)}, (8, 12)),
    ],
)
def test_logits_lie_on_the_finest_grid_or_that_of_stride_4(
    shapes: Any, grid: tuple[int, int]
) -> None:
    """Logits lie on the teacher's finest grid or on that of stride 4, whichever is finer."""
    assert logit_grid(shapes, VIEW) == grid
    network = FeatureInterpreter(shapes, 3, width=32, grid=grid)
    assert network({name: torch.randn(1, *shape) for name, shape in shapes.items()}).shape == (
        1,
        3,
        *grid,
    )


def test_every_map_and_the_image_alone_decide_an_images_logits() -> None:
    """An image's logits depend on each of its maps and on no other image of the batch."""
    network = SPEC.build().eval()
    x = maps()
    whole = network(x)
    assert whole.shape == (2, 3, 8, 12)
    assert torch.allclose(network({n: v[:1] for n, v in x.items()}), whole[:1], atol=1e-5)
    for name in SHAPES:
        assert not torch.allclose(network({**x, name: torch.zeros_like(x[name])}), whole, atol=1e-3)
    assert replace(SPEC, level="image").build().eval()(x).shape == (2, 3, 1, 1)


def test_a_width_that_its_groups_do_not_divide_is_refused() -> None:
    """A width that is not a multiple of GroupNorm's 32 groups is refused."""
    with pytest.raises(ConfigError, match=r"`width` 48: expected a multiple of 32"):
        replace(SPEC, width=48).build()


def test_a_folder_gives_the_same_interpreter_back(tmp_path: Path) -> None:
    """A saved and loaded interpreter has the same configuration and the same outputs."""
    network = SPEC.build().eval()
    save_interpreter(network, SPEC, tmp_path)
    found = load_interpreter(tmp_path)
    assert found.spec == SPEC
    assert torch.equal(found.network(maps()), network(maps()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, r"kind 'other', expected 'dtcache interpreter 1'\); fit it again"),
        (
            {"width": 1 << 30},
            r"not the configuration of an interpreter \(a size of 1073741824 is not a number",
        ),
        ({"width": 48}, r"an interpreter \(a width of 48 is not a multiple of 32\); fit it again"),
        (
            {"validation": {"images": 2, "miou": float("nan"), "accuracy": None}},
            r"nan is not a number from 0 to 1",
        ),
        (
            {"validation": {"images": 2, "miou": None, "accuracy": 1e300}},
            r"1e\+300 is not a number from 0 to 1",
        ),
        ({"validation": {"images": True, "miou": 0.5, "accuracy": 0.5}}, r"scores of True images"),
        (
            {"width": 64},
            r"model.safetensors: not the weights of this interpreter .*needs \d+ bytes, the file "
            r"has",
        ),
        ({"classes": ["sky"]}, r"not the weights of this interpreter"),
        ({"classes": ["x"] * 300}, r"a size of 300 is not a number from 1 to 256"),
        (
            {"shapes": {"t50/stride8": [6, 4]}},
            r"its shapes are not \(channels, height, width\) by array",
        ),
        ({"shapes": 3}, r"not the configuration of an interpreter"),
        ({"teacher": {}}, r"its teacher's fields are not those"),
        (
            {"view": {"height": 32, "width": 48, "resize_mode": "x"}},
            r"resize_mode 'x' is neither crop nor stretch",
        ),
    ],
)
def test_a_folder_that_was_changed_is_refused(tmp_path: Path, change: Json, message: str) -> None:
    """A changed folder is refused with one line before memory is allocated."""
    save_interpreter(SPEC.build(), SPEC, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(WeightsError, match=message):
        load_interpreter(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    """Missing configuration, missing weights and non-finite weights each give one line."""
    with pytest.raises(
        ConfigError, match=r"config.json: missing; expected an output folder of dtcache label fit"
    ):
        load_interpreter(tmp_path)
    network = SPEC.build()
    torch.nn.init.constant_(network.logits.bias, float("nan"))  # type: ignore[arg-type]
    save_interpreter(network, SPEC, tmp_path)
    with pytest.raises(WeightsError, match=r"some of them are not finite"):
        load_interpreter(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"the weights are missing; fit it again"):
        load_interpreter(tmp_path)


def test_features_of_its_own_teacher_are_served(tmp_path: Path) -> None:
    """A cache may have more taps than the interpreter reads, but must have all of those."""
    more = {**SHAPES, "t50/stride4": (3, 8, 12)}
    require_serves(SPEC, tmp_path, RECIPE, more)
    del more["t50/stride8"]
    with pytest.raises(CacheMismatchError, match=r"taps is stride16, stride4 in the cache"):
        require_serves(SPEC, tmp_path, RECIPE, more)


@pytest.mark.parametrize(
    ("recipe", "shapes", "message"),
    [
        (
            {"teacher": {**TEACHER, "weights_sha256": "c" * 64}},
            SHAPES,
            r"other features: teacher weights_sha256 is c{64} in the cache, the interpreter "
            r"expects a{64}",
        ),
        (
            {"teacher": {**TEACHER, "ddim_steps": 20}},
            SHAPES,
            r"teacher ddim_steps is 20 in the cache, the interpreter expects None",
        ),
        (
            {"view": {"height": 64, "width": 64, "resize_mode": "crop"}},
            SHAPES,
            r"view is \{'height': 64.* in the cache",
        ),
        (
            {},
            {"t150/stride8": (6, 4, 6), "t150/stride16": (10, 2, 3)},
            r"timesteps is t150 in the cache, the interpreter expects t50;",
        ),
        (
            {},
            {"t50/stride8": (6, 4, 6)},
            r"taps is stride8 in the cache, the interpreter expects stride16, stride8;",
        ),
        (
            {},
            {**SHAPES, "t50/stride8": (7, 4, 6)},
            r"shape of t50/stride8 is \(7, 4, 6\) in the cache, the interpreter expects \(6, 4, "
            r"6\)",
        ),
    ],
)
def test_other_features_are_refused_and_the_difference_named(
    tmp_path: Path, recipe: Json, shapes: Any, message: str
) -> None:
    """Another teacher, timestep, tap set, shape or view is refused, and the difference is named."""
    with pytest.raises(CacheMismatchError, match=message):
        require_serves(SPEC, tmp_path, {**RECIPE, **recipe}, shapes)
