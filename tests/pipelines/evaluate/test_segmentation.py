"""Segmentation: heads, training recipe, masks, and options that are refused."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.nn import functional as F

from cli import main
from dtcache.device import resolve_compute
from dtcache.errors import ConfigError, ImagesError, TrainingError
from dtcache.options import EvaluateOptions, ExtractOptions
from dtcache.recipe import ViewSpec
from dtcache.student import make_backbone, save_backbone
from dtcache.student.segmentation_heads import FpnHead, LinearHead
from dtcache.teacher.ddpm import build_unet, save_teacher
from pipelines.evaluate.dense_features import open_trunk
from pipelines.evaluate.evaluate import evaluate
from pipelines.evaluate.masked_images import masked_images
from pipelines.evaluate.segmentation import SegmentationResult, class_names, segment
from pipelines.extract.extract import extract
from pipelines.terminal.console import Terminal

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
NAMES = ("red", "green", "blue")
SIZE = 32
TINY = "test_resnet"


def write_set(root: Path, count: int, *, seed: int, names: tuple[str, ...] = NAMES) -> None:
    """Write noisy images of four 16 px tiles in three colours, and masks of the colours."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    (root / "masks" / "classes.toml").write_text(f"names = {json.dumps(names)}")
    for number in range(count):
        mask = np.kron(rng.integers(0, 3, (2, 2)), np.ones((SIZE // 2, SIZE // 2), np.int64))
        pixels = COLOURS[mask] + rng.integers(-30, 30, (SIZE, SIZE, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{number}.png")
        Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / f"{number}.png")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and test images with masks."""
    root = tmp_path_factory.mktemp("segment")
    write_set(root / "train", 24, seed=1)
    write_set(root / "test", 8, seed=2)
    return root


def options_for(root: Path, **changes: object) -> EvaluateOptions:
    """Return options for a folder with train/ and test/."""
    plain = EvaluateOptions(
        task="segmentation",
        train=root / "train/images",
        train_masks=root / "train/masks",
        test=root / "test/images",
        test_masks=root / "test/masks",
        size=str(SIZE),
        batch_size=8,
        epochs=8,
        device="cpu",
        precision="fp32",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


# Heads.


def test_the_linear_head_is_a_convolution_of_the_enlarged_and_concatenated_maps() -> None:
    """The linear head is one 1x1 convolution over standardised maps resized to the finest grid."""
    torch.manual_seed(0)
    shapes = [(4, 8, 8), (6, 4, 4), (5, 2, 2)]
    head = LinearHead(shapes, 3, momentum=None)
    maps = [3 * torch.randn(2, *shape) + 1 for shape in shapes]
    head.train()(maps)
    head.eval()
    flat = [
        (x - x.mean((0, 2, 3), keepdim=True)) / x.var((0, 2, 3), keepdim=True).add(1e-5).sqrt()
        for x in maps
    ]
    large = torch.cat(
        [F.interpolate(x, (8, 8), mode="bilinear", align_corners=False) for x in flat], 1
    )
    weight = torch.cat([conv.weight for conv in head.convolutions], 1)
    torch.testing.assert_close(
        head(maps), F.conv2d(large, weight, head.convolutions[0].bias), rtol=1e-4, atol=1e-4
    )


def test_the_fpn_head_reads_four_maps_or_makes_them_of_one() -> None:
    """The FPN head takes four maps, or builds four from a plain ViT's one, and refuses others."""
    pytest.importorskip("segmentation_models_pytorch")
    shapes = [(8, 16, 16), (16, 8, 8), (16, 4, 4), (32, 2, 2)]
    assert FpnHead(shapes, 5, (64, 64))([torch.randn(2, *s) for s in shapes]).shape == (
        2,
        5,
        16,
        16,
    )
    assert FpnHead([(64, 4, 4)], 5, (64, 64))([torch.randn(2, 64, 4, 4)]).shape == (2, 5, 16, 16)
    with pytest.raises(
        ConfigError, match=r"grids of 9x9, 5x5, 3x3, 2x2 at an input of 36x36 .* multiples of 32"
    ):
        FpnHead([(8, 9, 9), (8, 5, 5), (8, 3, 3), (8, 2, 2)], 5, (36, 36))


def test_the_fpn_head_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without segmentation-models-pytorch the error gives the extra to install."""
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.decoders.fpn.decoder", None)
    with pytest.raises(ConfigError, match=r"`head='fpn'`: .*pip install 'dtcache\[segmentation\]'"):
        FpnHead([(8, 8, 8)], 5, (64, 64))


# The whole evaluation.


def test_colours_are_told_apart_by_a_frozen_random_network(shelf: Path) -> None:
    """A linear head on random frozen features learns classes that differ in colour, repeatably."""
    result = evaluate(TINY, options_for(shelf))
    assert isinstance(result, SegmentationResult)
    assert result.miou > 80 and result.pixel_accuracy > 90
    assert (result.num_train, result.num_test, result.name, result.finetuned) == (
        24,
        8,
        f"{TINY} (random weights)",
        False,
    )
    assert list(result.iou) == list(NAMES) and result.miou == pytest.approx(
        np.mean(list(result.iou.values()))
    )
    torch.manual_seed(123)
    assert segment(TINY, options_for(shelf)) == result
    assert segment(TINY, options_for(shelf, seed=1)) != result


@pytest.mark.parametrize("head", ["linear", "fpn"])
def test_finetuning_trains_the_backbone(shelf: Path, head: str, tmp_path: Path) -> None:
    """Finetuning learns the classes from given weights and leaves the weights' folder unchanged."""
    if head == "fpn":
        pytest.importorskip("segmentation_models_pytorch")
    backbone = make_backbone(TINY, init=None, seed=0)
    save_backbone(
        backbone, tmp_path / "b", input_size=(SIZE, SIZE), view=ViewSpec(height=SIZE, width=SIZE)
    )
    before = (tmp_path / "b" / "model.safetensors").read_bytes()
    options = options_for(
        shelf, head=head, finetune=True, size=None, epochs=4 if head == "fpn" else 8
    )
    result = segment(str(tmp_path / "b"), options)
    assert result.miou > 50 and result.finetuned
    assert result != segment(str(tmp_path / "b"), replace(options, finetune=False))
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == before


def test_a_cache_of_a_teacher_is_judged_by_its_taps(tmp_path: Path) -> None:
    """All taps of a cache give one row, and the teacher computes the images outside the cache."""
    write_set(tmp_path / "train", 12, seed=1)
    write_set(tmp_path / "test", 4, seed=2)
    torch.manual_seed(0)
    save_teacher(build_unet(SIZE, SIZE, (8, 16, 16), 1, 0), tmp_path / "teacher", torch.float32)
    taken = ExtractOptions(
        teacher=str(tmp_path / "teacher"),
        taps="2,4",
        timestep=(50,),
        quality="fp16",
        batch_size=4,
        device="cpu",
        precision="fp32",
    )
    extract(tmp_path / "train" / "images", tmp_path / "cache", taken)
    options = options_for(tmp_path, size=None, batch_size=4, epochs=20)
    with pytest.raises(
        ConfigError, match=r"4 of 16 images are not in the cache; pass the cache's `teacher`"
    ):
        segment(str(tmp_path / "cache"), options)
    result = segment(str(tmp_path / "cache"), replace(options, teacher=str(tmp_path / "teacher")))
    assert result.name == "cache" and result.miou > 60
    for changes, flag in (
        ({"finetune": True}, "`finetune`"),
        ({"head": "fpn"}, "`head='fpn'`"),
        ({"size": "32"}, "`size`"),
    ):
        with pytest.raises(
            ConfigError, match=rf"{flag}: expected a backbone, got the cache .*cache"
        ):
            segment(str(tmp_path / "cache"), replace(options, **changes))  # type: ignore[arg-type]


def test_a_mirrored_image_has_the_maps_of_its_mirrored_view(shelf: Path) -> None:
    """The trunk's mirrored maps are those of the mirrored image, and the mask is mirrored too."""
    options = options_for(shelf)
    trunk = open_trunk(TINY, options, 8, resolve_compute("cpu", "fp32"))
    train, _ = masked_images(options, trunk.view)
    batch = next(train.batches(trunk.view, 4))
    plain, mirrored = (trunk.maps(batch, np.full(4, flip), None, 0) for flip in (False, True))
    flipped = replace(
        batch, loaded=[replace(v, pixels_CHW=v.pixels_CHW[:, :, ::-1].copy()) for v in batch.loaded]
    )
    again = trunk.maps(flipped, np.full(4, False), None, 0)
    assert all(torch.equal(x, y) for x, y in zip(mirrored, again, strict=True))
    assert not torch.equal(plain[0], mirrored[0])


# Refused inputs.


def test_images_without_masks_are_left_out(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images without masks are skipped with a warning; an error is raised if none has a mask."""
    write_set(tmp_path / "train", 12, seed=1)
    for number in range(3):
        (tmp_path / "train" / "masks" / f"{number}.png").unlink()
    (tmp_path / "train" / "images" / "5.png").write_bytes(b"no image")
    train, test = masked_images(
        options_for(tmp_path, test=None, test_masks=None), ViewSpec(height=8, width=8)
    )
    assert len(train.images.indices) + len(test.images.indices) == 8
    errors = capsys.readouterr().err
    assert (
        "have no mask and are left out" in errors and "cannot be decoded and are left out" in errors
    )
    (tmp_path / "empty").mkdir()
    alone = options_for(shelf, train_masks=tmp_path / "empty", test=None, test_masks=None)
    with pytest.raises(
        ImagesError,
        match=r"no mask matches any of 20 training images; .*/empty/\d+\.png for \d+\.png",
    ):
        masked_images(alone, ViewSpec(height=8, width=8))


def test_classes_without_a_training_pixel_are_named(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes without a training pixel are named in a warning and have no IoU if untested too."""
    write_set(tmp_path / "train", 8, seed=1, names=(*NAMES, "gold"))
    options = options_for(
        tmp_path, test=shelf / "test/images", test_masks=shelf / "test/masks", epochs=1
    )
    with pytest.raises(
        ImagesError, match=r"classes\.toml: expected the classes and .* value of .*train/masks"
    ):
        segment(TINY, options)
    result = segment(TINY, replace(options, test=None, test_masks=None))
    warning = (
        "1 of 4 classes have no pixel in the training masks and will hardly be predicted: 3 (gold)"
    )
    assert f"warning: {warning}" in capsys.readouterr().err
    assert result.iou["gold"] is None and list(result.iou) == [*NAMES, "gold"]


def test_masks_of_one_class_are_refused(shelf: Path) -> None:
    """Masks with a single class besides the ignore index are refused."""
    options = options_for(shelf, test=None, test_masks=None)
    train, test = masked_images(options, ViewSpec(height=SIZE, width=SIZE))
    only = np.zeros_like(train.pixels)
    only[0] = 9
    sides = (
        replace(side, pixels=only, masks=replace(side.masks, names=None)) for side in (train, test)
    )
    with pytest.raises(
        ImagesError,
        match=r"masks: expected masks of at least two classes, got only 0 \(255 is",
    ):
        class_names(*sides)


def test_an_ignored_class_counts_nowhere(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class whose number is the ignore index has no IoU and no warning."""
    result = segment(TINY, options_for(shelf, ignore_index=0))
    assert result.iou["red"] is None and result.miou > 80
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_masks": None}, "`task='segmentation'`: expected `train_masks`"),
        ({"test_masks": None}, "expected `test_masks` with `test`"),
        ({"k": 3}, "`k`: not an option of `task='segmentation'`"),
        ({"knn_votes": "plain"}, "`knn_votes`: not an option of `task='segmentation'`"),
        ({"task": "classification"}, "`train_masks`: not an option of `task='classification'`"),
        ({"limit_train": 1, "batch_size": 1}, "expected at least 2 images per step"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    shelf: Path, changes: dict[str, object], message: str
) -> None:
    """Each contradiction of options raises an error that states what was expected."""
    with pytest.raises(ConfigError, match=message):
        evaluate(TINY, options_for(shelf, **changes))


def test_a_loss_that_is_not_finite_stops_with_one_line(shelf: Path) -> None:
    """A loss that is not finite stops the training with the step and the learning rate."""
    with pytest.raises(
        TrainingError, match=r"step \d+ of 24: the loss is (nan|inf); pass a lower `lr`"
    ):
        segment(TINY, options_for(shelf, lr=1e36))


# Command line.


def test_the_command_prints_json_or_a_table(shelf: Path) -> None:
    """The command prints only JSON with --json and otherwise a table with one row per class."""
    flags = ["evaluate", TINY, "--task", "segmentation", "--train", str(shelf / "train/images")]
    flags += [
        "--train-masks",
        str(shelf / "train/masks"),
        "--size",
        "32",
        "--epochs",
        "2",
        "--frozen",
    ]
    done = CliRunner().invoke(main, [*flags, "--json"])
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert (value["task"], value["model"], value["num_train"], value["num_test"]) == (
        "segmentation",
        TINY,
        20,
        4,
    )
    assert set(value["iou_per_class"]) == set(NAMES) and 0 <= value["miou"] <= 100
    table = CliRunner().invoke(main, flags).stdout
    assert all(word in table for word in (*NAMES, "mean", "IoU %"))


def test_names_with_brackets_are_shown_as_they_are() -> None:
    """Class names and paths with brackets are printed literally, not parsed as markup."""
    names = ("[/road]", "a [b]", "c\x1b[2J")
    found = SegmentationResult(
        name="x",
        head="runs/[/1]",
        finetuned=True,
        iou=dict.fromkeys(names, 1.0),
        miou=1.0,
        pixel_accuracy=1.0,
        num_train=1,
        num_test=1,
    )
    console = Terminal(width=120, record=True, file=io.StringIO())
    console.print(found.to_table("[/backbone]"))
    shown = console.export_text()
    assert all(word in shown for word in (*names[:2], r"c\x1b[2J", "[/backbone]", "runs/[/1]"))
