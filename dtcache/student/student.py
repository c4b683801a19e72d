"""A student: a backbone and the regressor that a cache's taps ask for."""

from collections.abc import Mapping

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from dtcache.errors import ConfigError
from dtcache.recipe import ViewSpec
from dtcache.student.backbone import MapsModule, Rgb, student_input
from dtcache.student.backbone_io import make_backbone
from dtcache.student.pyramid import SimplePyramid
from dtcache.student.regressor import FeatureRegressor


class Student(nn.Module):
    """A backbone and its regressor: uint8 views in, predictions of whitened teacher features out."""

    def __init__(
        self,
        backbone: MapsModule,
        regressor: FeatureRegressor,
        input_size: tuple[int, int],
        pyramid: SimplePyramid | None = None,
    ) -> None:
        """Join the parts; `pyramid` makes four maps of a backbone's one."""
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.regressor = regressor
        self.input_size = input_size

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return predictions (B, C, H, W) by tap array, of images in 0..255."""
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
    size: tuple[int, int] | None,
    width: int,
    init: str | None = None,
    seed: int = 0,
    regressor: str = "fpn-ppm",
    mean: Rgb = IMAGENET_DEFAULT_MEAN,
    std: Rgb = IMAGENET_DEFAULT_STD,
) -> Student:
    """Return a student of `targets` (C, H, W) by tap array.

    `student` is a timm name, or any module that turns images normalised by `mean` and `std` into a list of maps, finest
    first; of one map alone a simple pyramid is made. Its input is the view enlarged until the finest tap lies on the
    stride-4 level, unless `size` (H, W) is given. Its weights are a function of `seed`, and the caller's random numbers
    are left alone. Raises ConfigError where the network does not serve that size.
    """
    if size is None:
        size = default_size(targets, view)
    if isinstance(student, str):
        backbone: MapsModule = make_backbone(student, init=init, seed=seed, size=size)
    elif init is not None:
        raise ConfigError(
            f"--init {init}: expected with a timm name; load a module's weights before it is passed"
        )
    else:
        backbone = MapsModule(student, mean=mean, std=std)
    shapes = probe_maps(backbone, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pyramid = None
        if len(shapes) == 1:
            pyramid = SimplePyramid(shapes[0][0], size[0] / shapes[0][1])
            shapes = [
                (x.shape[1], x.shape[2], x.shape[3]) for x in pyramid(torch.zeros(1, *shapes[0]))
            ]
        channels = [c for c, _, _ in shapes]
        grids = [(h, w) for _, h, w in shapes]
        return Student(
            backbone, FeatureRegressor(channels, grids, targets, width, regressor), size, pyramid
        )


def default_size(targets: Mapping[str, tuple[int, int, int]], view: ViewSpec) -> tuple[int, int]:
    """Return the student's input size (H, W): the view, enlarged until the finest tap lies at stride 4."""
    finest = min(view.height // height for _, height, _ in targets.values())
    return view.height * max(1, 4 // finest), view.width * max(1, 4 // finest)


@torch.no_grad()
def probe_maps(
    backbone: MapsModule, size: tuple[int, int], flag: str = "--student-size"
) -> list[tuple[int, int, int]]:
    """Return the maps' shapes (C, H, W) at an input size, and leave the backbone in evaluation mode.

    Raises ConfigError, naming the flag, where the network does not take that size.
    """
    backbone.eval()
    like = next(backbone.parameters(), torch.zeros(()))
    try:
        maps = backbone(torch.zeros(1, 3, *size, device=like.device))
    except ConfigError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the student does not take images of {size[0]}x{size[1]} pixels ({reason}); give another {flag}"
        ) from error
    return [(x.shape[1], x.shape[2], x.shape[3]) for x in maps]
