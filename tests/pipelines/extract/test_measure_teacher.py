"""Measured equivariance: zero for an equivariant teacher, the formula's value for others."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dtcache.errors import TeacherError
from dtcache.images import load_views, open_source
from dtcache.options import ExtractOptions
from dtcache.recipe import Box, ViewSpec
from dtcache.teacher import CallableTeacher, load_teacher
from dtcache.teacher.aligned_crop import find_crop
from dtcache.teacher.ddim_inversion import Inversion
from pipelines.extract.measure_teacher import cut, measure, middle
from pipelines.extract.plan import ExtractionPlan, make_plan

TAPS = {"stride2": "pool", "stride8": "coarse"}


class Local(nn.Module):
    """Local maps without positions: averages of the squares of 2 and of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.coarse = nn.AvgPool2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.coarse(self.pool(x) ** 2)


class Ramp(nn.Module):
    """One map, the image's red plus a ramp over the columns, whose flip error is known."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(
            torch.linspace(-1, 1, x.shape[3]).expand(len(x), 1, x.shape[2], x.shape[3])
            + 0 * x[:, :1]
        )


def noisy(pixels_BCHW: Tensor, noise_BCHW: Tensor, timestep: int) -> Tensor:
    return pixels_BCHW + noise_BCHW


def plan_of(images: Path, teacher: CallableTeacher | Path, **options: object) -> ExtractionPlan:
    more = {"device": "cpu", "precision": "fp32", "batch_size": 16, **options}
    if isinstance(teacher, Path):
        return make_plan(open_source(images), ExtractOptions(teacher=str(teacher), **more))
    return make_plan(open_source(images), ExtractOptions(timestep=(0,), size="32", **more), teacher)


def test_a_teacher_that_follows_errs_by_nothing(scene_folder: Path) -> None:
    """An equivariant teacher has zero error, since noise is mirrored and cropped with the image."""
    plan = plan_of(
        scene_folder,
        CallableTeacher(Local(), taps=TAPS, version="1", prepare=noisy, alpha_bars=[0.5]),
    )
    measured = measure(plan, 40).equivariance
    assert measured is not None
    assert (measured.images, measured.box) == (8, Box(top=8, left=8, height=16, width=16))
    assert set(measured.flip) == set(measured.crop) == {"t0/stride2", "t0/stride8"}
    assert (
        max([*measured.flip.values(), *measured.crop.values(), *measured.crop_interior.values()])
        < 1e-10
    )
    assert set(measured.crop_interior) == {"t0/stride2"}


def test_the_flip_error_is_the_formulas(scene_folder: Path) -> None:
    """The flip error is ||F(flip x) - flip F(x)||^2 / ||F(x)||^2: 4 for a map of flipped sign."""
    plan = plan_of(scene_folder, CallableTeacher(Ramp(), taps={"stride4": "pool"}, version="1"))
    measured = measure(plan, 40).equivariance
    assert measured.flip["t0/stride4"] == pytest.approx(4.0, rel=1e-6)
    centres = (torch.arange(32, dtype=torch.float64) / 31 * 2 - 1).reshape(8, 4).mean(1)
    half = (torch.arange(16, dtype=torch.float64) / 15 * 2 - 1).reshape(4, 4).mean(1)
    wanted = centres[2:6]
    assert measured.crop["t0/stride4"] == pytest.approx(
        float((half - wanted).square().sum() / wanted.square().sum()), rel=1e-6
    )


def test_a_unet_is_measured_against_its_own_passes(scene_folder: Path, teacher_dir: Path) -> None:
    """A U-Net's flip and crop errors equal those of full passes with hooks, without our teacher."""
    plan = plan_of(scene_folder, teacher_dir, timestep=(150,), size="32")
    measured = measure(plan, 40).equivariance
    unet = load_teacher(str(teacher_dir)).denoiser.unet
    taps = {}
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[150]
    unet.up_blocks[1].upsamplers[0].register_forward_pre_hook(
        lambda m, args: taps.update(x=args[0])
    )

    def features(x: Tensor) -> Tensor:
        with torch.inference_mode():
            unet(x, 150)
        return taps["x"].double()

    loaded = list(
        load_views(plan.source, [s.index for s in plan.samples[:8]], plan.view, threads=1)
    )
    batch = plan.teacher.batch(
        [plan.input(view.pixels_CHW, row, False, [0]) for row, view in enumerate(loaded)]
    )
    x = a.sqrt() * (batch.pixels_BCHW.float() / 127.5 - 1) + (1 - a).sqrt() * batch.noise[0][150]
    whole = features(x)
    mirrored = features(x.flip(3))
    cropped = features(x[:, :, 8:24, 8:24])
    mean = whole.mean((1, 2, 3), keepdim=True)
    std = whole.std((1, 2, 3), keepdim=True, correction=0)

    def error(found: Tensor, wanted: Tensor) -> float:
        return float(
            ((found - wanted) / std).square().sum() / ((wanted - mean) / std).square().sum()
        )

    part = whole[:, :, 2:6, 2:6]
    assert measured.flip["t150/stride4"] == pytest.approx(error(mirrored, whole.flip(3)), rel=1e-3)
    assert measured.crop["t150/stride4"] == pytest.approx(error(cropped, part), rel=1e-3)
    inner = error(cropped[:, :, 1:3, 1:3], part[:, :, 1:3, 1:3])
    assert measured.crop_interior["t150/stride4"] == pytest.approx(inner, rel=1e-3)
    assert 0.01 < measured.flip["t150/stride4"] < 3


def test_measuring_twice_gives_the_same_bits(scene_folder: Path, teacher_dir: Path) -> None:
    """Two measurements give the same bits, so a resumed extraction records the same values."""
    first, second = (measure(plan_of(scene_folder, teacher_dir, size="32"), 40) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((32, 32), Box(top=8, left=8, height=16, width=16)),
        ((16, 64), Box(top=0, left=16, height=8, width=32)),
        ((24, 40), Box(top=8, left=8, height=8, width=16)),
        ((8, 32), None),
    ],
)
def test_crops_lie_on_the_coarsest_grid(
    teacher_dir: Path, size: tuple[int, int], box: Box | None
) -> None:
    """Crops are half a side, rounded down to the coarsest stride, or absent if a side is empty."""
    denoiser = load_teacher(str(teacher_dir)).denoiser
    height, width = size
    assert (
        find_crop(
            denoiser, denoiser.find_taps(height, width), ViewSpec(height=height, width=width), 1
        )
        == box
    )


def test_no_crop_where_the_teacher_takes_one_size_only(scene_folder: Path) -> None:
    """A teacher that fails at the crop's size is measured with flips only."""

    class Fixed(Local):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.zeros(1, 1, 32, 32))

    measured = measure(
        plan_of(scene_folder, CallableTeacher(Fixed(), taps=TAPS, version="1")), 40
    ).equivariance
    assert (measured.box, measured.crop, measured.crop_interior) == (None, None, None)
    assert set(measured.flip) == {"t0/stride2", "t0/stride8"}


def test_features_that_are_not_finite_are_refused(scene_folder: Path) -> None:
    """A teacher whose features are not finite on a crop is refused with advice."""

    class Overflowing(Local):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.shape[3] == 32 or len(x) == 1 else x * float("inf"))

    plan = plan_of(scene_folder, CallableTeacher(Overflowing(), taps=TAPS, version="1"))
    with pytest.raises(
        TeacherError,
        match=r"not finite at t0/stride2 of a mirrored or cropped image; try `precision=",
    ):
        measure(plan, 40)


def test_an_inversion_that_is_not_finite_is_refused(
    scene_folder: Path, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inversion that is not finite is refused with its timestep."""
    plan = plan_of(
        scene_folder, teacher_dir, size="32", encoding="ddim", ddim_steps=2, batch_size=2
    )
    monkeypatch.setattr(
        Inversion, "round_trip", lambda self, x, t, labels: torch.full((len(x),), float("nan"))
    )
    with pytest.raises(
        TeacherError, match=r"images inverted to `timestep=150` are not finite; pass a lower"
    ):
        measure(plan, 40)


def test_parts_of_maps() -> None:
    """A box is cut in proportion to the map's size, and the centre omits a quarter per side."""
    map_BCHW = torch.arange(64).reshape(1, 1, 8, 8)
    part = cut(map_BCHW, Box(top=8, left=16, height=16, width=8), 32, 32)
    assert part.flatten().tolist() == [20, 21, 28, 29, 36, 37, 44, 45]
    assert middle(map_BCHW).shape == (1, 1, 4, 4)
    assert middle(map_BCHW[:, :, :3, :3]).flatten().tolist() == [9]
    assert middle(map_BCHW[:, :, :2, :2]).numel() == 0
