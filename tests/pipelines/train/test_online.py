"""The online teacher: a baseline that differs from cached training only in its batch source."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cli import run
from support.interrupts import interrupt

from dtcache.device import resolve_compute
from dtcache.distributed import Processes
from dtcache.options import TrainOptions
from dtcache.teacher.ddpm import build_unet, save_teacher
from pipelines.train.cached_batches import CachedSource
from pipelines.train.online_batches import OnlineSource
from pipelines.write_scenes import write_scenes

CPU = ("--precision", "fp32", "--device", "cpu")
FLAGS = (
    "--student",
    "resnet10t",
    "--epochs",
    "2",
    "--batch-size",
    "8",
    "--warmup-epochs",
    "1",
    "--fpn-width",
    "16",
    "--log-every",
    "1",
    "--save-every",
    "1",
    "--student-size",
    "32",
    "--taps",
    "4,8",
    *CPU,
)

IN_THE_LOOP = ("--teacher", "x", "--timestep", "150")


def metrics(run_folder: Path) -> list[dict]:
    """Return the deterministic metrics, without times."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second", "wait_share")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


@pytest.fixture
def online(teacher_dir: Path) -> tuple[str, ...]:
    """Return the flags of an online teacher."""
    return (*FLAGS, "--teacher", str(teacher_dir), "--timestep", "150")


def source_of(images: Path, teacher: Path, **options: object) -> OnlineSource:
    """Return an online source of tiny batches."""
    chosen = {
        "batch_size": 8,
        "taps": "4,8",
        "timestep": 150,
        "precision": "fp32",
        "num_workers": 1,
    }
    asked = TrainOptions(teacher=str(teacher), **{**chosen, **options})
    return OnlineSource(images, asked, resolve_compute("cpu", "fp32"), Processes())


def targets(source: OnlineSource, epoch: int, start: int = 0) -> list[torch.Tensor]:
    """Return the stride-8 targets of an epoch's batches."""
    return [
        source.ready(batch).coefficients["t150/stride8"] for batch in source.epoch(epoch, start)
    ]


def test_the_first_epoch_is_that_of_an_exact_cache(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Rows, views, images, targets and held-out samples equal a float16 cache of the same seed."""
    flags = (*CPU, "--batch-size", 8, "--quality", "fp16", "--taps", "4,8", "--timestep", 150)
    assert (
        run(
            "extract", scene_folder, "--teacher", teacher_dir, "--out", tmp_path / "c", *flags
        ).exit_code
        == 0
    )
    options = TrainOptions(batch_size=8, precision="fp32", num_workers=1)
    cached = CachedSource([tmp_path / "c"], options, resolve_compute("cpu", "fp32"), Processes())
    source = source_of(scene_folder, teacher_dir)
    assert source.names == cached.names
    assert source.num_batches == cached.num_batches
    for ours, theirs in (
        *zip(source.epoch(0, 0), cached.epoch(0, 0), strict=True),
        *zip(source.held_out(), cached.held_out(), strict=False),
    ):
        batch = source.ready(ours)
        count = len(batch.rows)
        assert batch.rows.tolist() == theirs.rows[:count].tolist()
        assert torch.equal(batch.images_BCHW, theirs.images_BCHW[:count])
        for name, wanted in cached.decode(theirs).items():
            torch.testing.assert_close(
                source.decode(batch)[name], wanted[:count], rtol=1e-3, atol=2e-3
            )
            torch.testing.assert_close(
                batch.scalars[name], theirs.scalars[name][:count], rtol=1e-4, atol=1e-5
            )


def test_noise_is_fresh_in_every_epoch_and_fixed_for_held_out(
    scene_folder: Path, teacher_dir: Path
) -> None:
    """A training target depends on (seed, key, epoch, flip), a held-out target on no epoch.

    A resume gives the same targets.
    """
    source = source_of(scene_folder, teacher_dir)
    whole = targets(source, 1)
    resumed = targets(source, 1, start=1)
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], resumed, strict=True))
    seen: dict[tuple[int, int], list[np.ndarray]] = {}
    for epoch in range(4):
        for batch in source.epoch(epoch, 0):
            mirrored = batch.inputs.pixels_BCHW.sum((1, 2)).tolist()
            for row, image, target in zip(
                batch.rows.tolist(),
                mirrored,
                source.ready(batch).coefficients["t150/stride8"],
                strict=True,
            ):
                seen.setdefault((row, hash(tuple(image))), []).append(target.numpy())
    twice = [found for found in seen.values() if len(found) > 1]
    assert twice
    assert all(not np.allclose(found[0], found[1]) for found in twice)
    held = [
        torch.cat([source.ready(b).coefficients["t150/stride8"] for b in source.held_out()])
        for _ in range(2)
    ]
    assert torch.equal(*held)


def test_an_online_run_trains_and_resumes_to_the_bit(
    scene_folder: Path, tmp_path: Path, online: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An online run writes losses per tap and an export, and resumes to the bit."""
    from pipelines.train.trainer import Trainer

    result = run("train", scene_folder, "--out", tmp_path / "a", *online)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a" / "backbone" / "model.safetensors").exists()
    interrupt(monkeypatch, Trainer, "update", call=4)
    assert run("train", scene_folder, "--out", tmp_path / "b", *online).exit_code == 130
    assert run("train", scene_folder, "--out", tmp_path / "b", *online).exit_code == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    ends = [(tmp_path / name / "backbone" / "model.safetensors").read_bytes() for name in "ab"]
    assert ends[0] == ends[1]
    fresh = tmp_path / "other"
    torch.manual_seed(9)
    save_teacher(build_unet(32, 32, (16, 16, 32, 32), layers=1, attention=1), fresh, torch.float32)
    other = ("--teacher", fresh)
    said = run("train", scene_folder, "--out", tmp_path / "a", *online, *other).output
    assert "holds a run with another `teacher_weights_sha256`" in said
    write_scenes(tmp_path / "s", seed=8, size=32, count=40)
    said = run("train", tmp_path / "s" / "images", "--out", tmp_path / "a", *online).output
    assert "holds a run with another `samples`" in said


def test_an_image_that_cannot_be_read_is_named(
    teacher_dir: Path, tmp_path: Path, online: tuple[str, ...]
) -> None:
    """Online training stops at an unreadable image with the image's name."""
    write_scenes(tmp_path / "s", seed=7, size=32, count=40)
    for path in (tmp_path / "s" / "images").rglob("*.png"):
        path.write_bytes(b"no image")
    result = run("train", tmp_path / "s" / "images", "--out", tmp_path / "r", *online)
    assert result.exit_code == 1
    assert ".png: " in result.output
    assert "remove it, or train from a cache, which leaves it out" in result.output.replace(
        "\n", " "
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--teacher", "x"), "--teacher: expected --timestep beside it; pass both, as to extract"),
        (("--prompt", "x"), "--prompt: only a teacher in the loop uses this option"),
        (("--resize-mode", "stretch"), "--resize-mode: only a teacher in the loop uses this"),
        (
            (*IN_THE_LOOP, "--shuffle", "block"),
            "--shuffle: only a cache uses this option, and with --teacher there is no cache",
        ),
        ((*IN_THE_LOOP, "--allow-incomplete"), "--allow-incomplete: only a cache uses this option"),
        (
            (*IN_THE_LOOP, "--noise-weighting"),
            "--noise-weighting: a cache records the teacher's noise, a teacher in the loop has no",
        ),
        (("--ema-decay", "1"), "--ema-decay 1: expected a decay under 1, such as 0.999"),
        (("--warmup-epochs", "2"), "--warmup-epochs 2: expected fewer than the 2 --epochs"),
    ],
)
def test_options_that_contradict_each_other_are_named(
    scene_folder: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    """Options of a cache and options of an online teacher are refused together."""
    result = run("train", scene_folder, "--out", tmp_path / "r", *FLAGS, *flags)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert not (tmp_path / "r").exists()


def test_views_of_the_first_epoch_are_those_of_an_exact_cache(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, online: tuple[str, ...]
) -> None:
    """With crops and jitter the online losses of epoch 0 equal those of a float16 cache.

    Without a measured equivariance the run prints none.
    """
    extraction = (*CPU, "--batch-size", 8, "--quality", "fp16", "--taps", "4,8", "--timestep", 150)
    assert (
        run(
            "extract", scene_folder, "--teacher", teacher_dir, "--out", tmp_path / "c", *extraction
        ).exit_code
        == 0
    )
    views = (
        "--scale",
        "0.3,0.9",
        "--color-jitter",
        "0.5",
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--lr",
        "1e-5",
    )
    cached = run("train", tmp_path / "c", "--out", tmp_path / "cached", *FLAGS, *views)
    taught = run("train", scene_folder, "--out", tmp_path / "online", *online, *views)
    assert cached.exit_code == taught.exit_code == 0, (cached.output, taught.output)
    assert "crops: the teacher's features of a crop differ" in cached.output
    assert "crops:" not in taught.output
    steps = [
        [line["loss"] for line in metrics(tmp_path / name) if "loss" in line]
        for name in ("online", "cached")
    ]
    np.testing.assert_allclose(*steps, rtol=2e-3)
    seen_whole = run("train", scene_folder, "--out", tmp_path / "w", *online, *views[4:])
    assert seen_whole.exit_code == 0, seen_whole.output
    whole = [line["loss"] for line in metrics(tmp_path / "w") if "loss" in line]
    assert not np.allclose(whole, steps[0], rtol=2e-3)
