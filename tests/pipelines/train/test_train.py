"""Stage 2 on the command line: golden losses, exact resume, and a backbone that timm loads."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from support.cli import run, words
from support.files import flip
from support.interrupts import interrupt

from dtcache.cache.cache import Cache
from dtcache.cache.joined_cache import JoinedCache
from dtcache.cache.loader import Batching, EpochLoader
from dtcache.cache.selection import held_out, split_rows
from dtcache.device import resolve_compute
from dtcache.losses.teachers import TeacherTargets, make_teachers_objective
from dtcache.options import TrainOptions
from dtcache.row_set import RowSet
from dtcache.store.commits import CommitRecord, write_commit
from dtcache.store.manifest import CacheManifest, read_manifest, write_manifest
from dtcache.store.sample_index import read_samples
from dtcache.store.shard_index import read_objects
from dtcache.student import Augmentation, Student, build_student
from pipelines.train.distillation import DecodedBatch, Distillation

ROOT = Path(__file__).resolve().parents[3]
FLAGS = words(
    "--student resnet10t --epochs 3 --batch-size 8 --warmup-epochs 1 --fpn-width 16 "
    "--precision fp32 --device cpu --log-every 1 --save-every 2 --student-size 32 "
    "--taps 4,8"
)


def small_student(cache: Cache) -> Student:
    """Return an untrained 32 px student for all arrays of a cache."""
    targets = {name: cache.shape(name) for name in cache.names}
    return build_student("resnet10t", targets, cache.view, size=(32, 32), width=16, seed=0)


def decoded(cache: Cache, rows: list[int], views: list[int]) -> DecodedBatch:
    """Return a batch of all arrays of a cache, decoded."""
    decoder = cache.decoder(cache.names)
    read = cache.batch(rows, views, cache.names)
    return DecodedBatch(read, lambda batch: decoder(batch.coefficients))


def distillation(cache: Cache, options: TrainOptions) -> Distillation:
    """Return the losses of a 32 px student on this cache's batches."""
    codec = cache.reader.manifest.recipe["codec"]
    shapes = {name: cache.shape(name) for name in cache.names}
    teacher = TeacherTargets(names=tuple(shapes), fit=cache.fit, codec=codec)
    compute = resolve_compute("cpu", "fp32")
    return Distillation(
        objective=make_teachers_objective(options, [teacher], shapes),
        augmentation=Augmentation(
            scale=options.scale, color_jitter=options.color_jitter, seed=options.seed
        ),
        input_size=(32, 32),
        whitening=options.whitening,
        compute=compute,
    )


def losses(run_folder: Path) -> list[dict]:
    """Return the deterministic metrics, without times."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second", "wait_share")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


@pytest.fixture(scope="module")
def cache(scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 40 scenes."""
    out = tmp_path_factory.mktemp("train") / "cache"
    flags = words(
        "--precision fp32 --device cpu --batch-size 8 --shard-rows 8 --bytes-per-image 4608"
    )
    result = run("extract", scene_folder, "--teacher", teacher_dir, "--out", out, *flags)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    result = run("train", cache, "--out", out, *FLAGS)
    assert result.exit_code == 0, result.output
    return out


def test_every_loss_is_logged(trained: Path) -> None:
    """The metrics have each step's and each epoch's losses per tap, which add up to the total."""
    lines = losses(trained)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 7))
    assert [line["epoch"] for line in lines if "held_out/loss" in line] == [0, 1, 2]
    for line in steps:
        assert {"at/t150/stride4", "at/t150/stride8"} <= set(line)
        parts = [line["mse/t150/stride4"], line["mse/t150/stride8"]]
        assert line["loss"] == pytest.approx(np.mean(parts), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_the_loss_falls(cache: Path, tmp_path: Path, optimizer: str) -> None:
    """With either optimizer the last training losses are well below the first."""
    rate = "3e-3" if optimizer == "adamw" else "1e-2"
    flags = (*FLAGS, "--epochs", 15, "--lr", rate, "--optimizer", optimizer)
    assert run("train", cache, "--out", tmp_path / "r", *flags).exit_code == 0
    got = [line["loss"] for line in losses(tmp_path / "r") if "loss" in line]
    assert np.mean(got[-4:]) < 0.9 * np.mean(got[:4])


def test_the_first_loss_is_the_formulas(cache: Path, trained: Path) -> None:
    """The first losses, MSE and AT per tap, equal NumPy's from decoded maps."""
    opened = Cache(cache)
    names = ["t150/stride4", "t150/stride8"]
    rows, _ = split_rows(RowSet([0], [40]), opened.samples["key"].to_pylist())
    batch = next(
        iter(EpochLoader(opened, rows, names, Batching(batch_size=8, seed=0, threads=1)).epoch(0))
    )
    student = build_student(
        "resnet10t",
        {n: opened.shape(n) for n in names},
        opened.view,
        size=(32, 32),
        width=16,
        init=None,
        seed=0,
    ).train()
    with torch.no_grad():
        predicted = {n: p.double().numpy() for n, p in student(batch.images_BCHW).items()}
    targets = {n: t.double().numpy() for n, t in opened.decoder(names)(batch.coefficients).items()}
    logged = next(line for line in losses(trained) if line["step"] == 1)
    for name in names:
        p = predicted[name]
        t = targets[name]
        sigma, mu = (batch.scalars[name].double().numpy()[:, k, None, None, None] for k in (0, 1))
        q = [np.square(x).sum(1).reshape(8, -1) for x in (p, t * sigma + mu)]
        q = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in q]
        assert logged[f"mse/{name}"] == pytest.approx(np.square(p - t).mean(), rel=1e-4)
        assert logged[f"at/{name}"] == pytest.approx(
            np.linalg.norm(q[0] - q[1], axis=1).mean(), rel=1e-4
        )


def test_the_schedule_is_warm_up_and_cosine(trained: Path) -> None:
    """The learning rate rises linearly to 4e-3 x 8 / 256 in one epoch and falls by a cosine."""
    peak = 4e-3 * 8 / 256
    expected = [peak / 2, peak] + [peak * 0.5 * (1 + np.cos(np.pi * k / 4)) for k in range(4)]
    got = [line["lr"] for line in losses(trained) if "lr" in line]
    assert got == pytest.approx(expected)
    assert TrainOptions(optimizer="lamb", batch_size=2048).peak_lr == pytest.approx(4e-3)
    assert TrainOptions(lr=0.5).peak_lr == 0.5


def test_held_out_samples_are_never_trained_on(cache: Path) -> None:
    """The split by key hash gives disjoint and complete training and held-out rows."""
    opened = Cache(cache)
    rows, held = split_rows(RowSet([0], [40]), opened.samples["key"].to_pylist())
    assert sorted([*rows, *held]) == list(range(40))
    assert list(held) == held_out(opened.samples["key"].to_pylist())


def test_a_finished_run_is_not_repeated(cache: Path, trained: Path) -> None:
    """The same command on a finished run changes neither metrics nor weights."""
    before = (losses(trained), (trained / "backbone" / "model.safetensors").read_bytes())
    assert run("train", cache, "--out", trained, *FLAGS).exit_code == 0
    assert (losses(trained), (trained / "backbone" / "model.safetensors").read_bytes()) == before


def test_the_export_loads_in_timm(trained: Path) -> None:
    """timm loads the trained backbone strictly, with our weights, in both forms."""
    folder = trained / "backbone"
    ours = load_file(folder / "model.safetensors")
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours[name]), name
    pyramid = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    for name, value in pyramid.state_dict().items():
        assert torch.equal(value, ours[name]), name
    assert list(plain.pretrained_cfg["input_size"]) == [3, 32, 32]
    start = load_file(trained / "init" / "model.safetensors")
    assert start.keys() == ours.keys()
    assert not torch.equal(start["conv1.0.weight"], ours["conv1.0.weight"])


def test_an_interrupted_run_resumes_to_the_bit(
    cache: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run interrupted after five of six steps resumes to the same losses and weights."""
    from pipelines.train.trainer import Trainer

    calls = interrupt(monkeypatch, Trainer, "update", call=6)
    out = tmp_path / "run"
    result = run("train", cache, "--out", out, *FLAGS)
    assert result.exit_code == 130
    assert run("train", cache, "--out", out, *FLAGS).exit_code == 0
    assert len(calls) == 6 + 2
    assert losses(out) == losses(trained)
    assert (out / "backbone" / "model.safetensors").read_bytes() == (
        trained / "backbone" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_curve(cache: Path, tmp_path: Path) -> None:
    """A run that SIGKILL ends at random steps resumes to an uninterrupted run's losses."""
    rng = random.Random(1)
    flags = [*FLAGS, "--epochs", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "cli.py"), "train", str(cache), *flags, "--out"]
    subprocess.run(
        [*command, str(tmp_path / "whole")], env=environment, check=True, capture_output=True
    )
    out = tmp_path / "killed"
    kills = 0
    for _ in range(5):
        process = subprocess.Popen(
            [*command, str(out)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = out / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.stat().st_size > before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run([*command, str(out)], env=environment, check=True, capture_output=True)
    assert kills >= 2
    assert losses(out) == losses(tmp_path / "whole")


def test_two_students_share_one_cache(cache: Path, tmp_path: Path) -> None:
    """A different backbone trains from the same cache, and the cache stays unchanged."""
    stamps = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    result = run(
        "train",
        cache,
        "--out",
        tmp_path / "r",
        *FLAGS,
        "--student",
        "mobilenetv3_small_100",
        "--epochs",
        2,
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "r" / "backbone" / "model.safetensors").exists()
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()} == stamps


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--taps", "16"),
            "--taps stride16: the cache has stride1, stride2, stride4, stride8; pass one of these",
        ),
        (
            ("--micro-batches", "3"),
            "--batch-size 8: expected a multiple of 3, the 3 micro-batches of each of 1 processes",
        ),
        (
            ("--micro-batches", "8"),
            "--micro-batches 8: expected at least 2 samples per micro-batch, got 1",
        ),
        (("--config", "nowhere.toml"), "--config nowhere.toml: No such file or directory"),
        (("--timestep", "50"), "--timestep 50: the cache has 150; pass one of these"),
        (
            ("--batch-size", "64"),
            "--batch-size 64: expected 1 to 20, the samples left for training",
        ),
        (("--student", "resnet5000"), "has no network of this name"),
        (("--student", "crossvit_tiny_240"), "expected a backbone with a feature pyramid"),
        (("--init", "nowhere"), "nowhere/config.json"),
        (
            ("--loss", "at", "--at-weight", "5"),
            "--at-weight 5: expected --loss mse+at, in which it weights AT",
        ),
        (
            ("--loss", "mse+at"),
            "--loss mse+at: expected the weight of AT beside the MSE; pass --at-weight, such as",
        ),
        (
            ("--tap-weights", "stride16=1"),
            "--tap-weights stride16: expected one of the taps trained on, t150/stride4,",
        ),
        (
            ("--scale", "1.0,0.3"),
            "--scale 1.0,0.3: expected two rising shares of the area over 0 and up to 1",
        ),
        (("--color-jitter", "3"), "--color-jitter 3: expected a strength from 0 (none) to 2"),
        (
            ("--student", "test_vit", "--student-size", "40"),
            "do not divide images of 40x40 pixels, so that its map would not fit the image. "
            "Expected multiples of 16; pass --student-size 32x32 or 48x48",
        ),
        (
            ("--student", "resnet18.a1_in1k"),
            "as the tag a1_in1k names pretrained weights, got random weights; pass "
            "--init pretrained",
        ),
    ],
)
def test_bad_options_are_one_clear_line(
    cache: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    """Invalid options are refused in one line with the allowed values."""
    result = run("train", cache, "--out", tmp_path / "r", *FLAGS, *flags)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", "")
    assert "Traceback" not in result.output
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_of_other_entries_is_one_clear_line(
    cache: Path, trained: Path, tmp_path: Path
) -> None:
    """Missing, mistyped, misshapen and negative entries are refused, and the file is kept."""
    out = tmp_path / "r"
    shutil.copytree(trained, out)
    whole = torch.load(out / "checkpoint.pt", weights_only=True)
    last = list(whole["student"])[-1]
    for changed in (
        {"student": {}},
        {"student": whole["student"] | {last: torch.zeros(())}},
        {"optimizer": {"state": {}, "param_groups": whole["optimizer"]["param_groups"]}},
        {"step": 10_000},
        {"clock": {"seconds": -1.0, "waited": 0.0, "images": 0}},
    ):
        torch.save(whole | changed, out / "checkpoint.pt")
        before = (out / "checkpoint.pt").read_bytes()
        result = run("train", cache, "--out", out, *FLAGS)
        assert result.exit_code == 1 and "Traceback" not in result.output
        assert "checkpoint.pt: not a checkpoint of this run" in " ".join(result.output.split())
        assert (out / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_other_groups_is_one_clear_line(
    cache: Path, trained: Path, tmp_path: Path
) -> None:
    """A checkpoint whose optimizer groups no longer fit is refused in one line, and kept."""
    out = tmp_path / "r"
    shutil.copytree(trained, out)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    groups[0]["params"].append(groups[1]["params"].pop())
    torch.save(state, out / "checkpoint.pt")
    before = (out / "checkpoint.pt").read_bytes()
    result = run("train", cache, "--out", out, *FLAGS)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "checkpoint.pt: not a checkpoint of this run: it does not fit the network" in said
    assert "finish the run with that version, or delete the file" in said
    assert "Traceback" not in said
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_run_of_other_options_is_refused(cache: Path, trained: Path) -> None:
    """A resume with other options is refused with the field that differs."""
    result = run("train", cache, "--out", trained, *FLAGS, "--seed", 1)
    assert result.exit_code == 2
    assert "holds a run with another --seed: expected 0, got 1" in result.output


def test_an_incomplete_or_absent_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    """Training refuses an unsealed or missing cache."""
    assert (
        "is not a cache: expected manifest.json"
        in run("train", tmp_path, "--out", tmp_path / "r", *FLAGS).output
    )
    broken = Path(shutil.copytree(cache, tmp_path / "c"))
    shard = next((broken / "data.zarr" / "t150").glob("c.*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "expected" in run("train", broken, "--out", tmp_path / "r", *FLAGS).output


def test_what_is_committed_can_be_trained_on(cache: Path, tmp_path: Path) -> None:
    """--allow-incomplete trains on the committed shards and prints their number of samples.

    A resume with more shards is refused.
    """
    part = Path(shutil.copytree(cache, tmp_path / "c"))
    manifest = read_manifest(part)
    records = [record_of(part, manifest, shard) for shard in range(manifest.num_shards)]
    (part / "commits").mkdir()
    for record in records[:4]:
        write_commit(part, record)
    files = {name: sha for name, sha in manifest.files.items() if name != "shards.parquet"}
    write_manifest(part, replace(manifest, state="writing", files=files, sums={}))
    refused = run("train", part, "--out", tmp_path / "r", *FLAGS)
    assert (
        "the cache is not complete; run its dtcache extract command again to finish it"
        in refused.output
    )
    flags = (*FLAGS, "--allow-incomplete", "--epochs", 1, "--warmup-epochs", 0)
    result = run("train", part, "--out", tmp_path / "r", *flags)
    assert result.exit_code == 0, result.output
    assert "is not complete: it has 32 of 40 samples" in result.output.replace("\n", " ")
    assert run("train", part, "--out", tmp_path / "r", *flags).exit_code == 0
    page = ("--cache", part, "--device", "cpu", "--report", tmp_path / "r.html")
    assert run("inspect", tmp_path / "r", *page).exit_code == 0
    write_commit(part, records[4])
    assert "or its samples have changed" in run("inspect", tmp_path / "r", *page).output
    assert (
        "holds a run with another `samples`"
        in run("train", part, "--out", tmp_path / "r", *flags).output
    )
    whole = run(
        "train", cache, "--out", tmp_path / "w", *FLAGS, "--allow-incomplete", "--epochs", 1
    )
    assert "is not complete" not in whole.output


def record_of(root: Path, manifest: CacheManifest, shard: int) -> CommitRecord:
    """Return the record of a committed shard of a sealed cache, without its sums."""
    listed = read_objects(root, manifest)
    paths = [array.object_path(shard) for array in manifest.arrays.values()]
    rows = manifest.rows_of(shard)
    content = read_samples(root, manifest).table()["content_sha256"].to_pylist()
    return CommitRecord(
        shard=shard,
        fingerprint=manifest.fingerprint,
        objects=tuple(listed[path] for path in paths),
        content_sha256=tuple(content[row].hex() for row in rows),
        failures=(),
        sums={},
    )


def test_the_resolved_options_can_be_given_back(cache: Path, trained: Path, tmp_path: Path) -> None:
    """A run's config.toml repeats and resumes the run to the bit, and flags override the file."""
    config = trained / "config.toml"
    assert run("train", cache, "--out", trained, "--config", config).exit_code == 0
    assert run("train", cache, "--out", tmp_path / "again", "--config", config).exit_code == 0
    assert losses(tmp_path / "again") == losses(trained)
    refused = run("train", cache, "--out", trained, "--config", config, "--seed", 1)
    assert "holds a run with another --seed: expected 0, got 1" in refused.output


def test_damaged_features_stop_the_run_naming_the_sample(cache: Path, tmp_path: Path) -> None:
    """A flipped byte stops training with the name of the damaged sample."""
    broken = Path(shutil.copytree(cache, tmp_path / "c"))
    for shard in (broken / "data.zarr" / "t150").glob("c.*"):
        flip(shard, 10)
    result = run("train", broken, "--out", tmp_path / "r", *FLAGS)
    assert result.exit_code == 1
    assert "the checksum does not match" in result.output.replace("\n", " ")
    assert ".png of t150, view" in result.output.replace("\n", "")


def test_a_loss_that_is_not_finite_stops_the_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN loss stops the run with step, term and samples, and no checkpoint is written."""
    from dtcache.losses import objective

    (tmp_path / "r" / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(objective, "mse_loss", lambda a, b: (a * float("nan")).mean())
    result = run("train", cache, "--out", tmp_path / "r", *FLAGS)
    assert result.exit_code == 1
    assert (
        "the loss is not finite at step 0 (loss, mse/t150/stride4, mse/t150/stride8"
        in result.output
    )
    # No step was taken: the folder is free for another attempt. The system's own folder stays.
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["lost+found"]


def test_a_target_that_is_not_finite_names_its_sample(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that is not finite is reported with its own sample only, in any micro-batch."""
    real = JoinedCache.batch
    spoilt = []

    def spoiling(
        self: JoinedCache, rows: np.ndarray, views: np.ndarray, names: list[str]
    ) -> object:
        batch = real(self, rows, views, names)
        spoilt.append(self.keys(rows)[1])
        batch.scalars["t150/stride8"][1] = float("nan")
        return batch

    monkeypatch.setattr(JoinedCache, "batch", spoiling)
    result = run(
        "train", cache, "--out", tmp_path / "r", *FLAGS, "--micro-batches", 2, "--num-workers", 1
    )
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert (
        f"not finite at step 0 (at/t150/stride8; samples {spoilt[0]}, {spoilt[1]}); "
        "lower --lr" in said
    )
    assert not (tmp_path / "r" / "checkpoint.pt").exists()


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_run_that_diverges_is_stopped(cache: Path, tmp_path: Path) -> None:
    """A diverging run ends in one line with the step and the number of samples."""
    result = run(
        "train", cache, "--out", tmp_path / "r", *FLAGS, "--lr", 1e30, "--warmup-epochs", 0
    )
    assert result.exit_code == 1
    assert "the loss is not finite at step" in result.output
    assert result.output.count(".png") == 8
    assert "Traceback" not in result.output


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_run_that_diverges_in_its_last_step_is_no_result(cache: Path, tmp_path: Path) -> None:
    """Held-out losses that are not finite are told at the end; there is no summary."""
    diverging = words("--lr 1e30 --epochs 1 --batch-size 20 --warmup-epochs 0")
    for _ in range(2):
        result = run("train", cache, "--out", tmp_path / "r", *FLAGS, *diverging)
        assert result.exit_code == 1
        assert "no finite losses of the last step, 1; if the student diverged" in result.output
        assert "Traceback" not in result.output
    assert not (tmp_path / "r" / "summary.json").exists()


def test_losses_of_every_tap_reach_the_backbone(cache: Path) -> None:
    """The summed loss has a gradient in the stem and in every regressor."""
    opened = Cache(cache)
    targets = {n: opened.shape(n) for n in opened.names}
    student = build_student(
        "resnet10t", targets, opened.view, size=None, width=16, init=None, seed=0
    ).train()
    assert student.input_size == (128, 128)
    batch = decoded(opened, [0, 1], [0, 1])
    distillation(opened, TrainOptions()).losses(student, batch)["loss"].backward()
    assert student.backbone.model.conv1[0].weight.grad.abs().sum() > 0
    assert all(head.weight.grad.abs().sum() > 0 for head in student.regressor.heads)


VIEW_FLAGS = (
    "--scale",
    "0.3,1.0",
    "--color-jitter",
    "0.5",
    "--noise-weighting",
    "--tap-weights",
    "stride4=2",
)


def test_random_views_resume_to_the_bit(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with crops and jitter, stopped between checkpoints, resumes to the same losses."""
    from pipelines.train.trainer import Trainer

    flags = (*FLAGS, *VIEW_FLAGS, "--epochs", "2")
    whole = run("train", cache, "--out", tmp_path / "whole", *flags)
    assert whole.exit_code == 0, whole.output
    assert "noise weighting: tap by tap (crops mix a map's bands)" in whole.output
    interrupt(monkeypatch, Trainer, "update", call=4)
    assert run("train", cache, "--out", tmp_path / "run", *flags).exit_code == 130
    assert run("train", cache, "--out", tmp_path / "run", *flags).exit_code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_crops_show_image_and_targets_by_one_box(cache: Path) -> None:
    """One crop box per row applies to the student's image and to the targets of MSE and AT.

    The MSE target is not whitened again, the AT target is the raw feature, and held-out batches are
    not cropped.
    """
    opened = Cache(cache)
    seen: dict[str, object] = {}
    whole, cropped = (distillation(opened, TrainOptions(scale=crop)) for crop in (None, "0.3,0.5"))
    whole.objective.register_forward_pre_hook(lambda _, inputs: seen.update(whole=inputs[1]))
    cropped.objective.register_forward_pre_hook(lambda _, inputs: seen.update(cropped=inputs[1]))
    student = small_student(opened)
    student.register_forward_pre_hook(lambda _, inputs: seen.update(images=inputs[0]))
    batch = decoded(opened, [3, 5], [0, 1])
    with torch.no_grad():
        whole.losses(student, batch, step=4)
        cropped.losses(student, batch, step=4)
    read = opened.batch([3, 5], [0, 1], opened.names)
    boxes = cropped.augmentation.boxes(4, batch.rows)
    for place, (left, top, right, bottom) in enumerate(boxes.double().tolist()):
        image = read.images_BCHW[place].double().numpy()
        expected = reference_crop(image, (left, top, right, bottom), (32, 32))
        np.testing.assert_allclose(seen["images"][place], expected, atol=0.01)
        for kind in ("whitened", "raw"):
            for name, x_BCHW in getattr(seen["whole"], kind).items():
                found = getattr(seen["cropped"], kind)[name][place]
                expected = reference_crop(
                    x_BCHW[place].double().numpy(), (left, top, right, bottom), found.shape[1:]
                )
                np.testing.assert_allclose(
                    found, expected, atol=1e-3 * float(np.abs(expected).max())
                )
    with torch.no_grad():
        whole.losses(student, batch)
        plain = seen["whole"].raw
        cropped.losses(student, batch)
    assert all(torch.equal(x, plain[name]) for name, x in seen["cropped"].raw.items())
    assert torch.equal(seen["images"], read.images_BCHW)


def reference_crop(x_CHW: np.ndarray, box: tuple[float, ...], size: tuple[int, int]) -> np.ndarray:
    """Return a box resampled at its cells' centres by scipy's bilinear interpolation."""
    from scipy.ndimage import map_coordinates

    height, width = x_CHW.shape[1:]
    left, top, right, bottom = box
    y = (top + (np.arange(size[0]) + 0.5) / size[0] * (bottom - top)) * height - 0.5
    x = (left + (np.arange(size[1]) + 0.5) / size[1] * (right - left)) * width - 0.5
    grid = np.meshgrid(y, x, indexing="ij")
    return np.stack([map_coordinates(plane, grid, order=1, mode="nearest") for plane in x_CHW])


@pytest.mark.parametrize(
    "flags",
    [
        ("--loss", "mse", "--regressor", "pafpn", "--noise-weighting"),
        ("--loss", "at", "--regressor", "fpn-attention"),
        ("--loss", "dreamteacher", "--regressor", "fpn", "--student", "test_vit"),
    ],
)
def test_every_kind_of_run_ends_in_a_backbone(
    cache: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """Other losses, regressors and a plain ViT train and export timm weights."""
    result = run("train", cache, "--out", tmp_path / "r", *FLAGS, "--epochs", 2, *flags)
    assert result.exit_code == 0, result.output
    backbone = tmp_path / "r" / "backbone"
    timm.create_model(f"local-dir:{backbone}", pretrained=True, num_classes=0)
    lines = [line for line in losses(tmp_path / "r") if "loss" in line]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    opened = Cache(cache)
    shares = opened.reader.manifest.recipe["codec"]["noise_share"]
    names = ("t150/stride4", "t150/stride8")
    determined = np.mean([max(1 - shares[name], 1 / 8) for name in names])
    for line in lines:
        per_tap = {
            "mse": [line.get(f"determined_mse/{name}", np.nan) / determined for name in names],
            "at": [line[f"at/{name}"] for name in names],
            "dreamteacher": [
                opened.shape(name)[0] * line[f"mse/{name}"] + 10 * line[f"at/{name}"]
                for name in names
            ],
        }
        assert line["loss"] == pytest.approx(np.mean(per_tap[flags[1]]), rel=1e-5)
