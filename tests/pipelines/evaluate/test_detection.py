"""Detection: results, exact resume, annotations that do not fit, and options that are refused."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.cli import run

from dtcache.errors import CacheMismatchError, ConfigError, ImagesError
from dtcache.options import EvaluateOptions
from pipelines.evaluate import evaluation_folder
from pipelines.evaluate.annotated_images import AnnotatedImages, annotated_images
from pipelines.evaluate.detection import DetectionResult, DetectorTraining, mirrored_image
from pipelines.evaluate.evaluate import evaluate
from pipelines.evaluate.pooled_features import open_network

pytest.importorskip("faster_coco_eval")
pytest.importorskip("torchmetrics")
SIZE = 32
TINY = "test_resnet"
NAMES = ("red", "blue")


def write_set(root: Path, count: int, *, seed: int) -> None:
    """Write grey images, each with a red and a blue rectangle; the last one has none."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number in range(count):
        pixels = rng.integers(100, 140, (SIZE, SIZE, 3)).astype(np.uint8)
        for kind in range(2) if number < count - 1 else ():
            x, y = 16 * kind + int(rng.integers(0, 4)), int(rng.integers(0, 18))
            w, h = rng.integers(8, 13, 2).tolist()
            pixels[y : y + h, x : x + w] = (220, 20, 20) if kind == 0 else (20, 20, 220)
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": number,
                    "category_id": kind,
                    "bbox": [x, y, w, h],
                    "segmentation": [corners],
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        record = {"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE}
        images.append(record)
    categories = [{"id": kind, "name": name} for kind, name in enumerate(NAMES)]
    write_boxes(root, {"images": images, "annotations": objects, "categories": categories})


def write_boxes(root: Path, content: object) -> None:
    """Write the annotations of a set."""
    (root / "boxes.json").write_text(json.dumps(content))


def edited(shelf: Path, root: Path) -> tuple[EvaluateOptions, dict[str, Any]]:
    """Return options whose test annotations are `root`/boxes.json, and content to write there."""
    options = replace(options_for(shelf), test_boxes=root / "boxes.json")
    return options, json.loads((shelf / "test/boxes.json").read_text())


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and test images with objects."""
    root = tmp_path_factory.mktemp("detect")
    write_set(root / "train", 9, seed=1)
    write_set(root / "test", 4, seed=2)
    return root


def options_for(root: Path, **changes: object) -> EvaluateOptions:
    """Return options for a folder with train/ and test/."""
    plain = EvaluateOptions(
        task="detection",
        train=root / "train/images",
        train_boxes=root / "train/boxes.json",
        test=root / "test/images",
        test_boxes=root / "test/boxes.json",
        size=str(SIZE),
        batch_size=4,
        epochs=1,
        fpn_width=8,
        device="cpu",
        precision="fp32",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def surveyed(options: EvaluateOptions) -> tuple[AnnotatedImages, AnnotatedImages]:
    """Return the training and the test set."""
    return annotated_images(options, open_network(TINY, options).view)


@pytest.mark.slow
def test_rectangles_of_two_colours_are_found(shelf: Path, tmp_path: Path) -> None:
    """A finetuned detector finds two colours; the learning rate follows COCO's schedule."""
    out = tmp_path / "out"
    options = options_for(shelf, finetune=True, epochs=40, lr=5e-3, out=out, fpn_width=16)
    result = evaluate(TINY, options)
    assert isinstance(result, DetectionResult)
    assert result.boxes.ap50 is not None and result.boxes.ap50 > 50
    assert (result.num_train, result.num_test, result.num_objects) == (9, 4, 6)
    assert result.classes == NAMES and result.masks is None and result.boxes.medium is None
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 81))
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[-1]["lr"] == pytest.approx(5e-5) and lines[40]["lr"] == pytest.approx(5e-3)


def test_a_resumed_training_gives_the_same_bits(
    shelf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Mask R-CNN, cut in mid-epoch and resumed, ends with the weights and scores of one run.

    The folder has the result and a picture.
    """
    whole = options_for(shelf, masks=True, epochs=2, out=tmp_path / "whole", finetune=True)
    uncut = evaluate(TINY, whole)
    assert isinstance(uncut, DetectionResult) and uncut.masks is not None
    assert uncut.to_json().keys() >= {*whole.scores} > {"ap", "mask_ap"}
    assert (uncut.num_train, uncut.num_test, uncut.num_objects) == (9, 4, 6)
    assert json.loads((tmp_path / "whole/evaluation.json").read_text()) == uncut.to_json()
    with Image.open(tmp_path / "whole/predictions.png") as picture:
        assert picture.size == (2 * 256 + 4, 4 * (256 + 4) - 4)
    assert "1 of 9 training images have no object: kept as negatives" in capsys.readouterr().err
    cut = replace(whole, out=tmp_path / "cut")
    batches = DetectorTraining.batches

    def interrupted(self: DetectorTraining, positions: list[int], size: int) -> Iterator[Any]:
        for number, batch in enumerate(batches(self, positions, size)):
            if number == 1:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_folder, "SAVE_SECONDS", 0)
        patch.setattr(DetectorTraining, "batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(TINY, cut)
    assert torch.load(tmp_path / "cut/checkpoint.pt")["step"] == 1
    resumed = evaluate(TINY, cut)
    assert resumed.to_json() == uncut.to_json()
    states = [torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut")]
    assert states[0]["step"] == states[1]["step"] == 4
    for name, value in states[0]["network"].items():
        assert torch.equal(value, states[1]["network"][name]), name
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]
    with pytest.raises(CacheMismatchError, match=r"holds a run with another `seed`: expected 0"):
        evaluate(TINY, replace(cut, seed=1))


def test_mirroring_moves_boxes_with_their_masks() -> None:
    """The box of a mirrored mask surrounds it."""
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[0, 1:3, 2:7] = True
    target = {"boxes": torch.tensor([[2.0, 1, 7, 3]]), "masks": mask}
    image, mirrored = mirrored_image(mask.float().expand(3, 4, 8), target)
    assert mirrored["boxes"].tolist() == [[1, 1, 6, 3]]
    assert mirrored["masks"][0, 1:3, 1:6].all() and mirrored["masks"].sum() == mask.sum()
    assert torch.equal(image[0].bool(), mirrored["masks"][0])


def test_file_names_that_are_not_among_the_images_are_counted_and_named(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few unknown names give a warning, images that are not listed are left out."""
    options, content = edited(shelf, tmp_path)
    content["images"][0]["file_name"] = "lost.png"
    write_boxes(tmp_path, content)
    _, test = surveyed(options)
    assert sorted(test.images.source.keys[i] for i in test.images.indices) == [
        "1.png",
        "2.png",
        "3.png",
    ]
    error = capsys.readouterr().err
    assert re.search(
        r"1 of 4 file names in .*boxes\.json are not among the test images: lost", error
    )
    assert "1 of 4 test images are not listed in" in error
    for image in content["images"]:
        image["file_name"] = f"lost/{image['file_name']}"
    write_boxes(tmp_path, content)
    with pytest.raises(ImagesError, match=r"none of its 4 file names is among the test images; ex"):
        surveyed(options)


def test_categories_are_matched_by_name(shelf: Path, tmp_path: Path) -> None:
    """Categories in another order have the numbers of training; other categories are refused."""
    options, content = edited(shelf, tmp_path)
    _, before = surveyed(options_for(shelf))
    content["categories"] = [{"id": 0, "name": "red"}, {"id": -1 + 2, "name": "blue"}]
    swap = {0: 1, 1: 0}
    for entry in (*content["categories"], *content["annotations"]):
        key = "id" if "name" in entry else "category_id"
        entry[key] = swap[entry[key]]
    write_boxes(tmp_path, content)
    _, after = surveyed(options)
    assert after.boxes.names == NAMES
    for key, objects in before.boxes.images.items():
        assert np.array_equal(objects.classes_N, after.boxes.images[key].classes_N)
    content["categories"][0]["name"] = "green"
    write_boxes(tmp_path, content)
    with pytest.raises(ImagesError, match=r"categories of .*only the first has red and only the"):
        surveyed(options)


def test_crowds_are_ignored_and_sets_without_objects_refused(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Crowd regions count as no objects; a test set of crowds alone has nothing to score."""
    options, content = edited(shelf, tmp_path)
    content["annotations"][0]["iscrowd"] = 1
    write_boxes(tmp_path, content)
    _, test = surveyed(options)
    assert test.objects_K.sum() == 5
    assert "1 crowd regions in the test images: not learned, and ignored" in capsys.readouterr().err
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    write_boxes(tmp_path, content)
    with pytest.raises(ImagesError, match=r"expected test images with objects, got none in 4 ima"):
        surveyed(options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_boxes": None}, r"expected `train_boxes`, a COCO JSON file"),
        ({"test_boxes": None}, r"expected `test_boxes` with `test`"),
        ({"head": "fpn"}, r"`head`: not an option of `task='detection'`"),
        ({"label_fraction": 0.1}, r"`label_fraction`: not an option of `task='detection'`"),
    ],
)
def test_options_that_contradict_the_task_are_refused(
    shelf: Path, changes: dict[str, object], message: str
) -> None:
    """Missing annotations and options of other tasks are refused before anything is read."""
    with pytest.raises(ConfigError, match=message):
        evaluate(TINY, options_for(shelf, **changes))


def test_the_command_prints_the_scores_and_refuses_pixels(shelf: Path) -> None:
    """`--json` has every score; a model without a network is refused with the flag."""
    flags = ["--task", "detection", "--size", SIZE, "--batch-size", 4, "--epochs", 1]
    flags += ["--fpn-width", 8, "--device", "cpu", "--precision", "fp32"]
    for side in ("train", "test"):
        flags += [f"--{side}", shelf / side / "images"]
        flags += [f"--{side}-boxes", shelf / side / "boxes.json"]
    done = run("evaluate", TINY, *flags, "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["task"] == "detection" and 0 <= values["ap"] <= 100 and "mask_ap" not in values
    assert set(values["ap_per_class"]) == set(NAMES)
    refused = run("evaluate", "pixels", *flags)
    assert refused.exit_code != 0 and refused.output.count("\n") == 1
    assert (
        "pixels: expected a backbone folder or a timm name, as --task detection" in refused.output
    )
