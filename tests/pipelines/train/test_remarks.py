"""What `dtcache train` says at its start: cost, notes about options, and an estimate of time."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from dtcache.device import resolve_compute
from dtcache.distributed import Processes
from dtcache.losses.objective import Objective
from dtcache.losses.teachers import TeachersObjective, TeacherTargets
from dtcache.options import TrainOptions
from dtcache.recipe import ViewSpec
from dtcache.student import Student, build_student
from pipelines.runs.folder import CHECKPOINT
from pipelines.train import remarks as module
from pipelines.train.remarks import (
    Pace,
    cost_line,
    crops_line,
    noise_line,
    regressor_line,
    regressor_share,
    size_line,
)
from pipelines.train.train import open_source, train
from pipelines.train.trainer import Trainer

TARGETS = {"t150/stride4": (8, 8, 8), "t150/stride8": (16, 4, 4)}
VIEW = ViewSpec(height=32, width=32)
OPTIONS = TrainOptions(
    student="test_resnet",
    epochs=1,
    batch_size=8,
    warmup_epochs=0,
    fpn_width=16,
    loss="mse",
    precision="fp32",
    device="cpu",
    num_workers=1,
    student_size="32",
    log_with="none",
)


def small_student(name: str = "test_resnet", *, width: int = 16, kind: str = "fpn") -> Student:
    """Return a student of two taps at 32 px."""
    return build_student(name, TARGETS, VIEW, size=(32, 32), width=width, regressor=kind)


def test_a_run_says_what_it_takes(
    scene_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line has the steps, and the bytes of the checkpoint that the run then writes."""
    options = replace(OPTIONS, ema_decay=0.9)
    compute = resolve_compute("cpu", "fp32")
    source = open_source([scene_cache], options, compute, Processes())
    trainer = Trainer(source, options, compute, Processes())
    line = cost_line(trainer, options)
    train([scene_cache], tmp_path / "run", options)
    assert line in capsys.readouterr().err.splitlines()
    size = (tmp_path / "run" / CHECKPOINT).stat().st_size
    said = float(line.rpartition("the checkpoint ")[2].removesuffix(" MiB")) * 2**20
    assert said == pytest.approx(size, rel=0.05)
    weights = sum(x.numel() for x in trainer.student.parameters()) * 4
    memory = float(line.partition("optimizer take ")[2].partition(" MiB")[0]) * 2**20
    assert memory - said == pytest.approx(weights, abs=0.15 * 2**20)
    assert line.startswith(f"{source.num_batches} steps of 8 images; weights, gradients and")
    trainer.steps_done = 1
    assert f"{source.num_batches} steps of 8 images (1 done);" in cost_line(trainer, options)
    train([scene_cache], tmp_path / "run", options)
    assert "steps of" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_regressors_share_is_that_of_its_multiply_adds(name: str) -> None:
    """The share equals multiply-adds counted by hand from the shapes of every layer.

    A plain ViT's attention belongs to the backbone, its simple pyramid to the regressor.
    """
    student = small_student(name)
    counts: dict[str, int] = {}
    modules = dict(student.named_modules())
    names = {layer: name for name, layer in modules.items()}

    def count(layer: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        match layer:
            case torch.nn.ConvTranspose2d():
                number = inputs[0].numel() * layer.weight[0].numel()
            case torch.nn.Conv2d() | torch.nn.Linear():
                number = output.numel() * layer.weight[0].numel()
            case _:  # attention: queries times keys, and weights times values
                number = 2 * inputs[0].shape[1] * inputs[0].numel()
        counts[names[layer]] = number

    for layer in modules.values():
        counted = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)
        if isinstance(layer, counted) or type(layer).__name__ == "Attention":
            layer.register_forward_hook(count)
    share = regressor_share(student)
    of_backbone = sum(n for name, n in counts.items() if name.startswith("backbone."))
    assert share == pytest.approx(1 - of_backbone / sum(counts.values()), rel=1e-6)
    assert 0.05 < share < 0.95
    parts = {name.partition(".")[0] for name in counts}
    assert parts == {"backbone", "regressor"} | ({"pyramid"} if name == "test_vit" else set())


def test_a_costly_regressor_is_mentioned_with_its_fix() -> None:
    """Above a third of a step's operations the line has the share and names `fpn_width`."""
    wide = small_student(width=128)
    options = replace(OPTIONS, regressor="fpn", fpn_width=128)
    share = regressor_share(wide)
    assert regressor_line(wide, options) == (
        f"the regressor (fpn, width 128) takes {share:.0%} of a step's operations; a smaller "
        "`fpn_width` makes steps faster"
    )
    assert share > 1 / 3
    assert regressor_line(small_student(width=2), options) is None


@pytest.mark.parametrize(
    ("size", "finest", "ratio"),
    [
        ((32, 32), 4, None),
        ((64, 64), 4, "4 times the pixels of 32x32"),
        ((64, 64), 2, None),
        ((48, 48), 2, None),
        ((32, 96), 2, "0.75 times the pixels of 64x64"),
        ((128, 128), 2, "4 times the pixels of 64x64"),
        ((40, 40), 8, "1.56 times the pixels of 32x32"),
    ],
)
def test_a_student_larger_than_the_default_is_mentioned(
    size: tuple[int, int], finest: int, ratio: str | None
) -> None:
    """A size beyond view x max(1, 4 / finest stride) has a line with the ratio of pixels."""
    line = size_line(size, {"t150/x": (8, 32 // finest, 32 // finest)}, VIEW)
    assert (line is None) == (ratio is None)
    if line is not None and ratio is not None:
        assert line.startswith(f"student size {size[0]}x{size[1]} has {ratio}, which suffices for")


def test_noise_that_is_weighted_tap_by_tap_is_mentioned() -> None:
    """Without bands the line has the reason; with bands, or no weighting, there is no line."""
    plain = Objective({}, {})
    teacher = TeacherTargets(names=())
    objective = TeachersObjective([plain], [teacher], weights=[1.0], floors=[0.0])
    weighted = replace(OPTIONS, noise_weighting=True)
    assert noise_line(objective, weighted) == (
        "noise weighting: tap by tap (a float16 cache has no bands)"
    )
    cropped = replace(weighted, scale="0.3,1.0")
    assert noise_line(objective, cropped) == (
        "noise weighting: tap by tap (crops mix a map's bands)"
    )
    assert noise_line(objective, OPTIONS) is None
    plain.bands["t150/stride4"] = torch.nn.Identity()
    assert noise_line(objective, weighted) is None


def test_a_run_that_crops_says_what_was_measured_of_crops() -> None:
    """The teacher's error under crops is shown if the run crops and the recipe has the error."""
    measured = TeacherTargets(names=tuple(TARGETS), crop_error={"t150/stride8": 0.25})
    cropping = replace(OPTIONS, scale="0.3,1.0")
    line = crops_line([measured], cropping)
    assert line is not None
    assert line.startswith(
        "crops: the teacher's features of a crop differ from the cropped features by t150/stride8 "
        "0.250 (measured relative squared error"
    )
    assert crops_line([TeacherTargets(names=tuple(TARGETS))], cropping) is None
    assert crops_line([measured], OPTIONS) is None


def test_the_time_is_estimated_from_the_median_of_the_first_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After ten timed steps one line has the time left; warm-up and outliers do not count."""
    seconds = [50.0, 50.0, *[2.0] * 9, 90.0, *[1.0] * 5]
    ends = accumulate(seconds)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(ends))
    pace = Pace(1812, torch.device("cpu"), shown=True)
    for _ in range(11):
        pace.stepped()
    assert capsys.readouterr().err == ""
    for _ in range(5):
        pace.stepped()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "about 1 h 0 min for the 1,800 steps left, 2 s each, and for evaluation more; memory so "
        "far: at most "
    )


@pytest.mark.parametrize(("steps", "shown"), [(12 + 29, True), (1812, False)])
def test_no_time_is_estimated_for_a_short_rest_or_another_process(
    steps: int, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With under a minute left, and in a process that prints nothing, there is no estimate."""
    ends = accumulate([2.0] * 20)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(ends))
    pace = Pace(steps, torch.device("cpu"), shown=shown)
    for _ in range(14):
        pace.stepped()
    assert capsys.readouterr().err == ""
