"""A student: a timm backbone and the regressor that a cache's taps ask for."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtcache.spec import ViewSpec
from dtcache.student.backbone import Backbone, student_input
from dtcache.student.folder import make_backbone
from dtcache.student.regressor import FeatureRegressor


class Student(nn.Module):
    """A backbone and its regressor: uint8 views in, predictions of whitened teacher features out."""

    def __init__(self, backbone: Backbone, regressor: FeatureRegressor, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.backbone, self.regressor, self.input_size = backbone, regressor, input_size

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return predictions (B, C, H, W) by tap array."""
        x_BCHW = student_input(images_BCHW, self.input_size, self.backbone.mean, self.backbone.std)
        predictions: dict[str, Tensor] = self.regressor(
            self.backbone(x_BCHW.contiguous(memory_format=torch.channels_last))
        )
        return predictions


def build_student(
    name: str,
    targets: Mapping[str, tuple[int, int, int]],
    view: ViewSpec,
    *,
    size: tuple[int, int] | None,
    width: int,
    init: str | None,
    seed: int,
) -> Student:
    """Return a student of `targets` (C, H, W) by tap array.

    Its input is the view enlarged until the finest tap lies on the stride-4 level, unless `size` (H, W) is given.
    """
    if size is None:
        finest = min(view.height // height for _, height, _ in targets.values())
        size = (view.height * max(1, 4 // finest), view.width * max(1, 4 // finest))
    backbone = make_backbone(name, init=init, seed=seed)
    backbone.eval()
    with torch.no_grad():
        grids = [(x.shape[2], x.shape[3]) for x in backbone(torch.zeros(1, 3, *size))]
    torch.manual_seed(seed)
    return Student(backbone, FeatureRegressor(backbone.channels, grids, targets, width), size)
