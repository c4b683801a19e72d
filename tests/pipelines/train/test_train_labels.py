"""`dtcache train --labels`: label distillation, mixed distillation and the exported head."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.cli import run, words
from support.interrupts import interrupt

from dtcache.cache.cache import Cache
from dtcache.cache.label_set import LabelledCache
from dtcache.cache.loader import Batching, EpochLoader
from dtcache.cache.selection import held_out
from dtcache.errors import ConfigError
from dtcache.losses.objective import LABEL_TARGET
from dtcache.options import TrainOptions
from dtcache.student import Student, build_student, load_backbone, probe_maps
from dtcache.student.logit_head import HeadSpec, load_head
from pipelines.runs.checkpoint import load_checkpoint
from pipelines.train.trainer import Trainer

FLAGS = words(
    "--student resnet10t --epochs 2 --batch-size 8 --warmup-epochs 1 --fpn-width 16 "
    "--precision fp32 --device cpu --log-every 1 --save-every 1 --student-size 32"
)


def lines(out: Path) -> list[dict[str, float]]:
    """Return a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def mixed(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of mixed distillation."""
    out = tmp_path_factory.mktemp("runs") / "mixed"
    result = run(
        "train", labelled, "--labels", "parts", "--label-weight", "2", "--out", out, *FLAGS
    )
    assert result.exit_code == 0, result.output
    return out


def student_of(run: Path, cache: LabelledCache) -> Student:
    """Return the student of a run's last checkpoint."""
    targets = {name: cache.shape(name) for name in cache.names} | {LABEL_TARGET: cache.labels.shape}
    student = build_student("resnet10t", targets, cache.view, size=(32, 32), width=16, seed=0)
    state = load_checkpoint(run)
    assert state is not None
    student.load_state_dict(state["student"])
    return student


def test_both_losses_are_logged_and_add_up(mixed: Path) -> None:
    """The loss is feature + 2 label in training and held out, and the label loss is logged too."""
    for line in lines(mixed):
        for title in ("", "held_out/"):
            if f"{title}loss" in line:
                weighed = line[f"{title}feature"] + 2 * line[f"{title}label"]
                assert line[f"{title}loss"] == pytest.approx(weighed, rel=1e-5)
                assert line[f"{title}label"] > 0
    assert "label loss" in run("inspect", mixed).output


def test_the_label_loss_is_the_softened_cross_entropy_against_the_stored_labels(
    mixed: Path, labelled: Path
) -> None:
    """The held-out label loss equals the softened cross-entropy to the stored labels in NumPy."""
    cache = LabelledCache(labelled, "parts")
    student = student_of(mixed, cache)
    rows = np.array(held_out(cache.samples["key"].to_pylist()))
    images = torch.from_numpy(np.stack(cache.images(rows)))
    with torch.no_grad():
        r = student.eval()(images)[LABEL_TARGET].numpy().astype(float)
    g = cache.labels.logits(rows)[:, 0].numpy().astype(float)
    p = [np.exp(x / 4) / np.exp(x / 4).sum(1, keepdims=True) for x in (g, r)]
    expected = -(p[0] * np.log(p[1])).sum(1).mean()
    assert lines(mixed)[-1]["held_out/label"] == pytest.approx(expected, rel=1e-4)


def test_labels_alone_train_without_features(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --feature-weight 0 no feature is read and the loss is the label loss."""
    read: list[list[str]] = []
    real = Cache.coefficients
    monkeypatch.setattr(
        Cache, "coefficients", lambda s, r, v, n: (read.append(list(n)), real(s, r, v, n))[1]
    )
    out = tmp_path / "run"
    result = run(
        "train", labelled, "--labels", "parts", "--feature-weight", "0", "--out", out, *FLAGS
    )
    assert result.exit_code == 0, result.output
    assert {name for names in read for name in names} == {"t0/logits"}
    assert all(line["loss"] == line["label"] for line in lines(out) if "loss" in line)
    assert run("inspect", out).exit_code == 0
    assert (
        run("inspect", out, "--report", tmp_path / "page.html", "--cache", labelled).exit_code == 0
    )


def test_a_run_resumes_to_the_bit(
    labelled: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An interrupted run resumes to the same backbone and head."""
    arguments = (
        "train",
        labelled,
        "--labels",
        "parts",
        "--label-weight",
        "2",
        "--out",
        tmp_path / "run",
        *FLAGS,
    )
    with monkeypatch.context() as patch:
        interrupt(patch, Trainer, "update", 4)
        assert run(*arguments).exit_code == 130
    assert run(*arguments).exit_code == 0
    for part in ("backbone", "head"):
        ours, theirs = (
            load_file(root / part / "model.safetensors") for root in (tmp_path / "run", mixed)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = run(*arguments[:4], "--label-weight", "3", "--out", tmp_path / "run", *FLAGS)
    assert "holds a run with another --label-weight: expected 2.0, got 3.0" in other.output


def test_a_run_with_labels_is_extended_with_the_same_labels(
    labelled: Path, mixed: Path, tmp_path: Path
) -> None:
    """The extension starts from the label head too; without labels, the option is named."""
    command = ("train", labelled, "--out", tmp_path / "run", *FLAGS, "--extend", mixed)
    refused = run(*command)
    assert (
        "expected its --labels, 'parts', got None; pass the options of that run" in refused.output
    )
    assert not (tmp_path / "run").exists()
    # The weights may differ: only the losses that are there decide what the student has.
    result = run(*command, "--labels", "parts", "--label-weight", "1", "--lr", "1e-12")
    assert result.exit_code == 0, result.output
    ours, theirs = (
        load_file(root / "head" / "model.safetensors") for root in (tmp_path / "run", mixed)
    )
    for name in theirs:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9)


def test_the_exported_head_gives_the_students_logits(mixed: Path, labelled: Path) -> None:
    """The exported backbone and head give the student's logits."""
    cache = LabelledCache(labelled, "parts")
    student = student_of(mixed, cache)
    backbone, size, _ = load_backbone(mixed / "backbone")
    head, spec = load_head(mixed / "head", probe_maps(backbone, size), size)
    assert spec.classes == cache.labels.classes
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        wanted = student.eval().regressor(student.backbone(x))[LABEL_TARGET]
        assert torch.allclose(head.eval()(backbone.eval()(x)), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["fpn", "fpn-attention", "pafpn"])
def test_a_head_of_every_regressor(kind: str) -> None:
    """For every regressor the exported head has the layers that the logits use."""
    from dtcache.recipe import ViewSpec
    from dtcache.student.logit_head import logit_head

    targets = {"t1/stride8": (4, 4, 4), "t1/stride16": (4, 2, 2), LABEL_TARGET: (3, 8, 8)}
    student = build_student(
        "resnet10t", targets, ViewSpec(height=32, width=32), size=(32, 32), width=8, regressor=kind
    ).eval()
    shapes = tuple(probe_maps(student.backbone, (32, 32)))
    spec = HeadSpec(
        classes=("a", "b", "c"),
        shapes=shapes,
        grid=(8, 8),
        width=8,
        regressor=kind,
        input_size=(32, 32),
    )
    maps = [torch.randn(2, *shape) for shape in shapes]
    with torch.no_grad():
        assert torch.allclose(
            logit_head(student, LABEL_TARGET, spec)(maps), student.regressor(maps)[LABEL_TARGET]
        )


def test_masks_without_names_take_the_heads(
    mixed: Path, scene_folder: Path, tmp_path: Path
) -> None:
    """Masks without class names take the head's names; more classes than the head's are refused."""
    names = load_head_of(mixed).classes
    few = tmp_path / "masks"
    shutil.copytree(scene_folder.parent / "masks", few)
    (few / "classes.toml").unlink()
    for path in few.rglob("*.png"):
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8)).save(path)
    flags = (
        "--task",
        "segmentation",
        "--train",
        scene_folder,
        "--train-masks",
        few,
        "--epochs",
        "1",
    )
    found = run("evaluate", mixed / "backbone", "--head", mixed, *flags, "--json")
    assert found.exit_code == 0, found.output
    scores = json.loads(found.stdout)["iou_per_class"]
    assert list(scores) == list(names)
    assert [name for name in names if scores[name] is not None] == list(names[:2])
    Image.fromarray(np.full((32, 32), len(names), np.uint8)).save(path)
    result = run("evaluate", mixed / "backbone", "--head", mixed, *flags)
    assert "class 7, class 8, class 9; pass --head linear for other classes" in result.output


def test_a_head_of_whole_images_is_no_head_of_pixels(mixed: Path, tmp_path: Path) -> None:
    """A head of image labels is refused for segmentation."""
    shutil.copytree(mixed / "head", tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "grid": [1, 1]}))
    backbone, size, _ = load_backbone(mixed / "backbone")
    with pytest.raises(
        ConfigError, match=r"head: expected a head for pixel labels, got one for image labels"
    ):
        load_head(tmp_path / "head", probe_maps(backbone, size), size)


def load_head_of(out: Path) -> HeadSpec:
    """Return the parts from which a run's head was built."""
    backbone, size, _ = load_backbone(out / "backbone")
    return load_head(out / "head", probe_maps(backbone, size), size)[1]


def test_segmentation_starts_from_the_head(mixed: Path, scene_folder: Path, tmp_path: Path) -> None:
    """At a learning rate near 0 the score is the trained head's, at either input size."""
    masks = scene_folder.parent / "masks"
    common = (
        "--task",
        "segmentation",
        "--train",
        scene_folder,
        "--train-masks",
        masks,
        "--device",
        "cpu",
        "--epochs",
    )
    flags = (*common, "1", "--lr", "1e-12", "--json")
    found = run("evaluate", mixed / "backbone", "--head", mixed, *flags)
    assert found.exit_code == 0, found.output
    again = run("evaluate", mixed / "backbone", "--head", mixed / "head", *flags)
    assert json.loads(again.stdout)["miou"] == json.loads(found.stdout)["miou"]
    assert (
        run("evaluate", mixed / "backbone", "--head", mixed, "--size", "64", *flags).exit_code == 0
    )
    result = run("evaluate", mixed / "backbone", "--head", tmp_path, *flags)
    assert (
        f"--head {tmp_path}: expected linear, fpn or a finished run that learned labels"
        in result.output
    )
    other = tmp_path / "masks"
    shutil.copytree(masks, other)
    (other / "classes.toml").write_text(f"names = {json.dumps([f'c{i}' for i in range(9)])}\n")
    result = run(
        "evaluate",
        mixed / "backbone",
        "--head",
        mixed,
        *(other if x == masks else x for x in flags),
    )
    assert f"--head {mixed}: expected masks of its classes, background, crescent" in result.output
    result = run("evaluate", mixed / "backbone", "--head", mixed, "--batch-size", "1", *flags)
    assert (
        "expected at least 2 images per step, since the head's pooling has one position, got 1"
        in result.output
    )
    result = run("evaluate", "resnet50", "--size", "32", "--head", mixed, *flags)
    assert "expected the backbone of its own run, with maps of" in result.output


@pytest.mark.slow
def test_labels_of_whole_images_train_too(labelled: Path, tmp_path: Path) -> None:
    """Image labels train a student with one logit vector per image."""
    root = tmp_path / "cache"
    shutil.copytree(labelled, root)
    flags = ("--width", "32", "--epochs", "2", "--warmup-epochs", "1", "--device", "cpu")
    assert (
        run("label", "fit", root, "--level", "image", "--out", tmp_path / "i", *flags).exit_code
        == 0
    )
    assert run("label", "write", root, tmp_path / "i", "--name", "kinds").exit_code == 0
    result = run("train", root, "--labels", "kinds", "--out", tmp_path / "run", *FLAGS)
    assert result.exit_code == 0, result.output
    assert lines(tmp_path / "run")[-1]["held_out/label"] > 0


@pytest.mark.slow
def test_crops_take_labels_along(labelled: Path, tmp_path: Path) -> None:
    """Random crops apply to the labels as to image and features."""
    result = run(
        "train",
        labelled,
        "--labels",
        "parts",
        "--scale",
        "0.4,1.0",
        "--out",
        tmp_path / "run",
        *FLAGS,
    )
    assert result.exit_code == 0, result.output


def test_block_shuffling_serves_labels_too(labelled: Path) -> None:
    """Block shuffling serves every row of a labelled cache with its labels."""
    cache = LabelledCache(labelled, "parts")
    loader = EpochLoader(
        cache,
        cache.reader.usable_rows,
        [],
        Batching(batch_size=8, seed=0, threads=1, shuffle="block", drop_last=False),
    )
    seen = [batch for batch in loader.epoch(0)]
    assert sorted(int(r) for batch in seen for r in batch.rows) == list(range(40))
    assert all(
        batch.labels is not None and len(batch.labels.views_B) == len(batch.rows) for batch in seen
    )
    moved = seen[0].changed(lambda x: x.clone())
    assert moved.labels is not None
    assert seen[0].labels is not None
    assert all(
        getattr(moved.labels, f.name).equal(getattr(seen[0].labels, f.name))
        for f in fields(moved.labels)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"label_weight": 1.0},
            r"`label_weight`: this option weights two losses, and without `labels` there is only",
        ),
        ({"feature_weight": 0.0}, r"`feature_weight`: this option weights two losses"),
        (
            {"labels": "x", "label_weight": 0.0},
            r"`label_weight` 0: expected a number over 0; leave `labels` out",
        ),
        (
            {"labels": "x", "feature_weight": 0.0, "at_weight": 1.0},
            r"`feature_weight` 0: no feature is trained on",
        ),
        (
            {"labels": "x", "teacher": "y", "timestep": 150},
            r"`labels`: only a cache uses this option, and with `teacher` there is no cache",
        ),
    ],
)
def test_weights_of_losses_that_are_not_there_are_refused(
    options: dict[str, object], message: str
) -> None:
    """Contradicting loss options are refused in one line."""
    with pytest.raises(ConfigError, match=message):
        TrainOptions(**options)  # type: ignore[arg-type]


def test_an_unknown_label_set_is_named_with_those_there_are(labelled: Path, tmp_path: Path) -> None:
    """An unknown label set is refused with the existing sets' names, and nothing is written."""
    result = run("train", labelled, "--labels", "part", "--out", tmp_path / "run", *FLAGS)
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == f"Error: {labelled}: no label set 'part'; it has parts"
    assert not (tmp_path / "run").exists()
