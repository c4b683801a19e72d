"""`dtcache label fit`: an interpreter from cached features and few masks; bad input is one line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.cli import run, words
from support.extraction import quick_extraction
from support.interrupts import interrupt

from dtcache.cache.cache import Cache
from dtcache.errors import ImagesError
from dtcache.labels import load_interpreter
from dtcache.metrics.segmentation import confusion_matrix, mean_iou
from pipelines.extract.extract import extract
from pipelines.label import fit_interpreter as fit
from pipelines.label.labelled_rows import images_with_masks, labelled_images
from pipelines.label.prediction_grid import label_picture

FLAGS = words("--width 32 --epochs 6 --warmup-epochs 1 --batch-size 2 --device cpu")


@pytest.fixture(scope="module")
def masks(scene_folder: Path, scene_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The masks of the cache's first ten images, and their class names."""
    out = tmp_path_factory.mktemp("masks")
    whole = scene_folder.parent / "masks"
    shutil.copy(whole / "classes.toml", out)
    for key in pq.read_table(scene_cache / "samples.parquet")["key"].to_pylist()[:10]:
        (out / key).parent.mkdir(exist_ok=True)
        shutil.copy(whole / key, out / key)
    return out


@pytest.fixture(scope="module")
def fitted(scene_cache: Path, masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter after a few epochs of training."""
    out = tmp_path_factory.mktemp("fit") / "interpreter"
    result = run("label", "fit", scene_cache, "--masks", masks, "--out", out, *FLAGS)
    assert result.exit_code == 0, result.output
    assert f"{out}: fitted to 8 labelled images; 2 held out, miou " in result.output
    return out


def test_the_loss_falls_and_every_epoch_is_scored(fitted: Path) -> None:
    """metrics.jsonl has one line per epoch with the falling mean loss and the validation mIoU."""
    lines = [json.loads(line) for line in (fitted / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(6))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert all(0 <= line["validation_miou"] <= 1 for line in lines)


def test_the_recorded_score_is_that_of_the_weights(
    fitted: Path, scene_cache: Path, masks: Path
) -> None:
    """The saved interpreter has its configuration's mIoU on the held-out images."""
    cache = Cache(scene_cache)
    found = load_interpreter(fitted)
    held = [i for i in range(10) if i not in _trained_on(10)]
    labelled = images_with_masks(cache, masks, None, None).take(held)
    coefficients, _ = cache.coefficients(labelled.rows, [0] * 2, cache.names)
    with torch.no_grad():
        logits = found.network(cache.decoder(cache.names)(coefficients))
    assert logits.shape == (2, 9, 8, 8)
    whole = torch.nn.functional.interpolate(
        logits, size=(32, 32), mode="bilinear", align_corners=False
    )
    counts = confusion_matrix(labelled.truth_NHW.numpy(), whole.argmax(1).numpy(), 9, 255)
    assert found.spec.validation is not None
    assert found.spec.validation["miou"] == pytest.approx(mean_iou(counts))
    assert found.spec.classes[0] == "background"


def _trained_on(count: int) -> list[int]:
    """Return the indices of the training images under seed 0."""
    order = fit.permuted(count, seed=0, stream="label-validation").tolist()
    return sorted(order[count // 5 :])


def test_the_mirrored_view_is_trained_with_the_mirrored_mask(
    scene_cache: Path, masks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The loss gets the mask for the unmirrored view and the mirrored mask for the other view."""
    cache = Cache(scene_cache)
    seen = []
    truth = {int(r): t for r, t in zip(*_pairs(cache, masks), strict=True)}
    real_read = Cache.coefficients
    real_loss = fit.interpreter_loss
    asked = []
    monkeypatch.setattr(
        Cache, "coefficients", lambda s, r, v, n: (asked.append((r, v)), real_read(s, r, v, n))[1]
    )
    monkeypatch.setattr(
        fit, "interpreter_loss", lambda z, y, i: (seen.append(y), real_loss(z, y, i))[1]
    )
    flags = words("--width 32 --epochs 2 --warmup-epochs 0 --validation 0 --device cpu")
    result = run("label", "fit", scene_cache, "--masks", masks, "--out", tmp_path / "i", *flags)
    assert result.exit_code == 0, result.output
    views = []
    for (rows, shown), batch in zip(asked, seen, strict=False):
        for row, view, mask in zip(rows, shown, batch, strict=True):
            assert torch.equal(mask, truth[int(row)].flip(1) if view else truth[int(row)])
            views.append(int(view))
    assert set(views) == {0, 1}


def _pairs(cache: Cache, masks: Path) -> tuple[np.ndarray, torch.Tensor]:
    labelled = images_with_masks(cache, masks, None, None)
    return labelled.rows, labelled.truth_NHW


def test_one_seed_gives_one_interpreter(
    scene_cache: Path, masks: Path, fitted: Path, tmp_path: Path
) -> None:
    """The same command gives the same weights to the bit."""
    assert (
        run(
            "label", "fit", scene_cache, "--masks", masks, "--out", tmp_path / "i", *FLAGS
        ).exit_code
        == 0
    )
    same = [(folder / "model.safetensors").read_bytes() for folder in (fitted, tmp_path / "i")]
    assert same[0] == same[1]


def test_the_picture_shows_image_mask_and_prediction(fitted: Path) -> None:
    """The picture has two held-out images in three columns."""
    with Image.open(fitted / "predictions.png") as picture:
        assert picture.size == (3 * 128 + 2 * 4, 2 * 128 + 4)


def test_ignored_pixels_are_white_and_classes_differ() -> None:
    """Each class has its own colour, ignored pixels are white, and images are optional."""
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    sheet = np.asarray(Image.open(_bytes(label_picture(None, [mask], [mask], 3, 255))))
    corners = [tuple(sheet[y, x]) for y, x in ((10, 10), (10, 120), (120, 10), (120, 120))]
    assert len(set(corners)) == 4
    assert corners[0] == (0, 0, 0)
    assert corners[3] == (255, 255, 255)
    assert sheet.shape[1] == 2 * 128 + 4


def _bytes(content: bytes) -> "fit.Path":
    import io

    return io.BytesIO(content)  # type: ignore[return-value]


def test_image_labels_come_from_the_index(scene_cache: Path, tmp_path: Path) -> None:
    """--level image trains the pooled head on the cache's labels and reports its accuracy."""
    result = run("label", "fit", scene_cache, "--level", "image", "--out", tmp_path / "i", *FLAGS)
    assert result.exit_code == 0, result.output
    assert "fitted to 32 labelled images; 8 held out, accuracy" in result.output
    found = load_interpreter(tmp_path / "i")
    assert found.spec.grid == (1, 1)
    assert len(found.spec.classes) == 8
    assert not (tmp_path / "i" / "predictions.png").exists()


def test_labels_that_are_no_class_numbers_are_refused(scene_cache: Path) -> None:
    """Without class names, labels out of the range of class numbers are refused."""
    cache = Cache(scene_cache)
    labels = [10**9] * 40
    cache.reader.manifest = replace(cache.reader.manifest, classes=None)
    place = cache.samples.schema.get_field_index("label")
    cache.samples = cache.samples.set_column(place, "label", [labels])
    with pytest.raises(
        ImagesError,
        match=r"expected labels from 0 to 16383, got 1000000000; number the classes from",
    ):
        labelled_images(cache, None)


def test_an_interrupted_fit_leaves_nothing(
    scene_cache: Path, masks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ctrl-C during training or writing leaves no folder, and the same command starts again."""
    arguments = ("label", "fit", scene_cache, "--masks", masks, "--out", tmp_path / "i", *FLAGS)
    for name, call in (("interpreter_loss", 3), ("label_picture", 1)):
        with monkeypatch.context() as patch:
            interrupt(patch, fit, name, call)
            assert run(*arguments).exit_code == 130
        assert list(tmp_path.iterdir()) == []
    assert run(*arguments).exit_code == 0


def test_a_class_without_a_pixel_is_named(scene_cache: Path, masks: Path, tmp_path: Path) -> None:
    """A class without a pixel gives a warning, and the fit continues."""
    more = tmp_path / "masks"
    shutil.copytree(masks, more)
    names = ["background", *(f"c{i}" for i in range(1, 9)), "unicorn"]
    (more / "classes.toml").write_text(f"names = {json.dumps(names)}\n")
    result = run("label", "fit", scene_cache, "--masks", more, "--out", tmp_path / "i", *FLAGS)
    assert result.exit_code == 0, result.output
    warning = (
        "1 of 10 classes have no pixel among the 8 images trained on and will hardly be "
        "predicted: 9 (unicorn)\n"
    )
    assert f"warning: {warning}" in result.output


def test_bad_input_is_one_line(
    scene_cache: Path, masks: Path, fitted: Path, tmp_path: Path
) -> None:
    """Bad input is refused with what was expected and got, and nothing is written."""
    bad = {name: tmp_path / name for name in ("none", "size", "value", "binary", "ignored")}
    for name in ("size", "value"):
        shutil.copytree(masks, bad[name])
    bad["none"].mkdir()
    for path in masks.rglob("*.png"):
        (bad["binary"] / path.relative_to(masks)).parent.mkdir(parents=True, exist_ok=True)
        binary = np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)
        Image.fromarray(binary).save(bad["binary"] / path.relative_to(masks))
    shutil.copytree(masks, bad["ignored"])
    for path in bad["ignored"].rglob("*.png"):
        Image.fromarray(np.full((32, 32), 255, np.uint8)).save(path)
    first = next(path for path in sorted(bad["size"].rglob("*.png")))
    Image.fromarray(np.zeros((30, 32), np.uint8)).save(first)
    second = next(path for path in sorted(bad["value"].rglob("*.png")))
    Image.fromarray(np.full((32, 32), 77, np.uint8)).save(second)
    broken = (
        (
            ("--masks", bad["none"]),
            "no mask matches any of the cache's 40 images; expected PNG files named by their",
        ),
        (("--masks", bad["size"]), f"{first}: expected the size of image "),
        (("--masks", bad["value"]), f"{second}: expected the values 0 to 8 of the classes in"),
        (
            ("--masks", bad["binary"]),
            f"{bad['binary']}: expected masks of at least two classes, got only 0 (2",
        ),
        (
            ("--masks", bad["ignored"]),
            f"{bad['ignored']}: expected masks of at least two classes, got none (255 is",
        ),
        (
            ("--level", "image", "--limit", "1"),
            f"{scene_cache}: expected labels of at least two classes, got ",
        ),
    )
    misuses = (
        (
            ("--masks", masks, "--seed", "4294967296"),
            "--seed 4294967296: expected at most 4294967295",
        ),
        (("--masks", tmp_path / "gone"), "expected a folder of masks (PNG), got none"),
        ((), "--masks: expected the folder of the masks; or pass --level image"),
        (
            ("--masks", masks, "--level", "image"),
            "--level image: reads the cache's own labels; leave --masks",
        ),
        (("--images", masks, "--level", "image"), "leave --masks, --ignore-index and --images out"),
        (("--masks", masks, "--validation", "1"), "--validation 1: expected a share under 1"),
        (
            ("--masks", masks, "--limit", "1"),
            "expected at least 2 labelled images, one of them held out, got 1",
        ),
        (("--masks", masks, "--width", "40"), "--width 40: expected a multiple of 32"),
        (("--masks", masks, "--taps", "64"), "--taps stride64: the cache has stride4, stride8"),
        (
            ("--masks", masks, "--epochs", "1", "--warmup-epochs", "1"),
            "--warmup-epochs 1: expected fewer than the 1",
        ),
    )
    for flags, message in broken + misuses:
        result = run("label", "fit", scene_cache, "--out", tmp_path / "i", *flags)
        assert result.exit_code == (1 if (flags, message) in broken else 2), flags
        assert message in result.output
        assert result.output.startswith("Error: ")
        assert result.output.count("\n") == 1
        assert not (tmp_path / "i").exists()
    result = run("label", "fit", scene_cache, "--masks", masks, "--out", fitted, *FLAGS)
    assert f"--out {fitted}: expected a new or empty folder, got one with files" in result.output


def test_an_incomplete_cache_is_refused(scene_cache: Path, masks: Path, tmp_path: Path) -> None:
    """`label fit` refuses a cache that is not finished."""
    from dtcache.store.manifest import read_manifest, write_manifest

    root = tmp_path / "cache"
    shutil.copytree(scene_cache, root)
    manifest = read_manifest(root)
    write_manifest(
        root,
        type(manifest)(
            **{f: getattr(manifest, f) for f in manifest.__slots__} | {"state": "writing"}
        ),
    )
    result = run("label", "fit", root, "--masks", masks, "--out", tmp_path / "i", *FLAGS)
    assert result.exit_code == 1
    assert "the cache is not complete; run its dtcache extract command again" in result.output


@pytest.fixture(scope="module", params=["view", "none"])
def cropped(
    request: pytest.FixtureRequest,
    scene_folder: Path,
    teacher_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Path]:
    """A cache whose view crops 48x40 px images, with the images and masks of the view's size."""
    root = tmp_path_factory.mktemp("cropped")
    for number, path in enumerate(sorted(scene_folder.rglob("*.png"))[:12]):
        mask = scene_folder.parent / "masks" / path.relative_to(scene_folder)
        for source, size, out in (
            (path, (48, 40), root / "images"),
            (mask, (32, 32), root / "masks"),
        ):
            out.mkdir(exist_ok=True)
            Image.open(source).resize(size, Image.Resampling.NEAREST).save(out / f"{number}.png")
    options = quick_extraction(
        teacher_dir, batch_size=4, bytes_per_image=4608, store_images=request.param == "view"
    )
    extract(root / "images", root / "cache", options)
    return root / "cache", root / "images", root / "masks"


def test_a_mask_drawn_on_the_view_is_refused_where_the_images_are_given(
    cropped: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --images a mask whose size differs from the original image is refused."""
    root, images, masks = cropped
    cache = Cache(root)
    assert len(images_with_masks(cache, masks, None, None)) == 12
    warning = (
        "the cache does not record the size of 12 of the 12 images with a mask, so masks "
        "of another size are not"
    )
    assert (
        f"warning: {warning} detected; pass the cache's images to check them\n"
        in capsys.readouterr().err
    )
    flags = ("--masks", masks, "--images", images)
    for command in (
        ("fit", root, "--out", tmp_path / "i", *FLAGS),
        ("write", root, tmp_path / "i", "--name", "b"),
    ):
        result = run("label", *command, *flags)
        assert result.exit_code == 1
        assert re.search(
            r"/\d+\.png: expected the size of image \d+\.png, 48x40 pixels, got 32x32",
            result.output,
        )
        # The second command needs an interpreter: fitted without the images.
        if command[0] == "fit":
            assert run("label", *command, "--masks", masks).exit_code == 0
    for path in masks.iterdir():
        Image.open(path).resize((48, 40), Image.Resampling.NEAREST).save(tmp_path / path.name)
    assert len(images_with_masks(cache, tmp_path, None, None, images)) == 12
    assert capsys.readouterr().err == ""
    result = run("label", "write", root, tmp_path / "i", "--name", "b", "--images", images)
    assert (
        "--images: expected together with --masks, whose sizes they check; leave it out"
        in result.output
    )


def test_images_that_are_not_the_caches_are_refused(
    cropped: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A different image file under a cached key is refused."""
    root, images, masks = cropped
    shutil.copytree(images, tmp_path / "images")
    Image.new("RGB", (48, 40)).save(tmp_path / "images" / "3.png")
    with pytest.raises(
        ImagesError, match=r"3\.png is not the image that the cache was extracted from"
    ):
        images_with_masks(Cache(root), masks, None, None, tmp_path / "images")
