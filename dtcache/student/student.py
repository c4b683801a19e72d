"""A student: a backbone and the regressor of a cache's taps.

Shapes: B batch, C channels, H rows, W columns.
"""

from collections.abc import Mapping
from numbers import Integral, Real

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from dtcache.arguments import list_of, require, require_count, wrong
from dtcache.errors import ConfigError
from dtcache.recipe import ViewSpec
from dtcache.student.backbone import MapsModule, Rgb, student_input
from dtcache.student.pyramid import MapShape, SimplePyramid, pyramid_for
from dtcache.student.regressor import FeatureRegressor, require_targets
from dtcache.student.timm_backbone import make_backbone


class Student(nn.Module):
    """A backbone and its regressor: from images to predictions of whitened teacher features."""

    def __init__(
        self,
        backbone: MapsModule,
        regressor: FeatureRegressor,
        input_size: tuple[int, int],
        pyramid: SimplePyramid | None = None,
    ) -> None:
        """Join the parts; `pyramid` makes four maps from the only map of a backbone."""
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.regressor = regressor
        self.input_size = input_size

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return predictions (B, C, H, W) by tap array from images (B, 3, H, W) in [0, 255]."""
        x_BCHW = student_input(images_BCHW, self.input_size, self.backbone.mean, self.backbone.std)
        maps = self.backbone(x_BCHW.contiguous(memory_format=torch.channels_last))
        predictions: dict[str, Tensor] = self.regressor(
            maps if self.pyramid is None else self.pyramid(maps[-1])
        )
        return predictions


def build_student(
    student: str | nn.Module,
    targets: Mapping[str, tuple[int, int, int]],
    view: ViewSpec,
    *,
    size: tuple[int, int] | None = None,
    width: int = 256,
    init: str | None = None,
    seed: int = 0,
    regressor: str = "fpn-ppm",
    mean: Rgb = IMAGENET_DEFAULT_MEAN,
    std: Rgb = IMAGENET_DEFAULT_STD,
) -> Student:
    """Return a student of `targets`, (C, H, W) by tap array.

    `student` is a timm name, or any module that turns images normalised by `mean` and `std` into a
    list of maps, finest first; a single map is extended to a simple pyramid. `size` (H, W) is the
    input size; by default it is the view, enlarged until the finest tap has the grid of the
    stride-4 level. `width` is the number of channels of the regressor, `regressor` its kind. The
    initial weights are a function of `seed`; the caller's random state is left unchanged. Raises
    ConfigError with the argument's name if one is wrong, or if the network does not take that size.
    """
    require("student", student, str | nn.Module, "a timm name or a torch module")
    require_targets(targets)
    require("view", view, ViewSpec, "the cache's view")
    require_count("seed", seed, 0)
    if init is not None:
        require("init", init, str, "a str")
    for name, values in (("mean", mean), ("std", std)):
        rgb = list_of(name, values, Real, "numbers")
        if len(rgb) != 3 or (name == "std" and min(rgb) <= 0):
            raise wrong(name, values, "three numbers" + (" over 0" if name == "std" else ""))
    if size is not None:
        sides = list_of("size", size, Integral, "integers")
        if len(sides) != 2 or min(sides) < 1:
            raise wrong("size", size, "(H, W) in pixels")
    else:
        size = default_size(targets, view)
    if isinstance(student, str):
        backbone: MapsModule = make_backbone(student, init=init, seed=seed, size=size)
    elif init is not None:
        raise ConfigError(
            f"`init` {init}: expected a timm name as `student`, got a module; load the module's "
            "weights before you pass it"
        )
    else:
        backbone = MapsModule(student, mean=mean, std=std)
    shapes = probe_maps(backbone, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pyramid, shapes = pyramid_for(shapes, size)
        channels = [c for c, _, _ in shapes]
        grids = [(h, w) for _, h, w in shapes]
        return Student(
            backbone, FeatureRegressor(channels, grids, targets, width, regressor), size, pyramid
        )


def default_size(targets: Mapping[str, tuple[int, int, int]], view: ViewSpec) -> tuple[int, int]:
    """Return the input size (H, W): the view, enlarged until the finest tap lies at stride 4."""
    finest = min(view.height // height for _, height, _ in targets.values())
    return view.height * max(1, 4 // finest), view.width * max(1, 4 // finest)


@torch.no_grad()
def probe_maps(
    backbone: MapsModule, size: tuple[int, int], option: str = "student_size"
) -> list[MapShape]:
    """Return the maps' shapes (C, H, W) at an input size (H, W), finest first.

    Leaves the backbone in evaluation mode. Raises ConfigError, which names the `option` to change,
    if the network does not take that size.
    """
    backbone.require_size(size, option)
    backbone.eval()
    like = next(backbone.parameters(), torch.zeros(()))
    try:
        maps = backbone(torch.zeros(1, 3, *size, device=like.device))
    except ConfigError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the student does not take images of {size[0]}x{size[1]} pixels ({reason}); pass "
            f"another `{option}`"
        ) from error
    return [(x.shape[1], x.shape[2], x.shape[3]) for x in maps]
