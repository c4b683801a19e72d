"""Several caches: teachers of the same images, and parts of one teacher over other images."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.cli import run, words
from support.extraction import quick_extraction
from support.interrupts import interrupt
from support.timm_folders import VIT, save_network

import dtcache
from dtcache.cache.cache import Cache
from dtcache.device import resolve_compute
from dtcache.distributed import Processes
from dtcache.errors import CacheMismatchError
from dtcache.options import TrainOptions
from dtcache.store.reader import CacheReader
from pipelines.extract.extract import extract
from pipelines.runs.metrics import read_metrics
from pipelines.train.cached_batches import CachedSource
from pipelines.train.train import train
from pipelines.train.trainer import Trainer

FLAGS = words(
    "--student test_resnet --epochs 2 --batch-size 8 --fpn-width 8 --device cpu --log-every 1"
    " --precision fp32 --log-with none --student-size 32 --warmup-epochs 1"
)
OPTIONS = TrainOptions(
    student="test_resnet",
    epochs=2,
    batch_size=8,
    fpn_width=8,
    device="cpu",
    precision="fp32",
    log_every=1,
    log_with="none",
    student_size="32",
)
VIT_CHANGES: dict[str, Any] = {"timestep": None, "taps": "block2,block4", "size": "32"}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a small ViT as a teacher."""
    folder = tmp_path_factory.mktemp("vit")
    save_network(folder, **VIT)
    return f"timm:local-dir:{folder}"


@pytest.fixture(scope="module")
def vit_cache(vit: str, scene_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the scenes by the ViT, without images, in another order of the rows."""
    out = tmp_path_factory.mktemp("caches") / "vit.cache"
    changes = {**VIT_CHANGES, "seed": 5, "store_images": False, "quality": "fp16"}
    extract(scene_folder, out, quick_extraction(Path(vit), **changes))
    return out


@pytest.fixture(scope="module")
def halves(
    scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Two caches of one teacher over 17 and 23 of the scenes: one float16, one compressed."""
    root = tmp_path_factory.mktemp("halves")
    files = sorted(path for path in scene_folder.rglob("*") if path.is_file())
    caches = []
    for name, some, changes in (
        ("old", files[:17], {"quality": "fp16", "shard_rows": 4}),
        ("new", files[17:], {"bytes_per_image": 4608, "shard_rows": 6, "seed": 9}),
    ):
        folder = root / name
        for path in some:
            copy = folder / path.relative_to(scene_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        extract(folder, root / f"{name}.cache", quick_extraction(teacher_dir, **changes))
        caches.append(root / f"{name}.cache")
    return caches


def source_of(*caches: Path, **changes: Any) -> CachedSource:
    """Return the batches of caches on the CPU."""
    chosen: dict[str, Any] = {"student": "test_resnet", "batch_size": 8, **changes}
    return CachedSource(caches, TrainOptions(**chosen), resolve_compute("cpu", "fp32"), Processes())


def require_own_features(source: CachedSource, *caches: Path) -> list[str]:
    """Compare an epoch's images and targets with each cache's own; return the keys in order.

    The caches are read sample by sample, by key.
    """
    opened = {path.stem: Cache(path) for path in caches}
    served = []
    for batch in source.epoch(0, 0):
        decoded = source.decode(batch)
        keys = source.keys(batch.rows)
        served += keys
        for place, key in enumerate(keys):
            pictured = next(c for c in opened.values() if key in c and c.has_images)
            image_CHW = pictured[key].image_CHW
            is_mirrored = not torch.equal(batch.images_BCHW[place], image_CHW)
            if is_mirrored:
                assert torch.equal(batch.images_BCHW[place], image_CHW.flip(2))
            for name, maps_BCHW in decoded.items():
                teacher, _, own = (
                    name.partition("/") if len(source.teachers) > 1 else ("", "", name)
                )
                holders = [opened[teacher]] if teacher else opened.values()
                cache = next(c for c in holders if key in c)
                sigma, mu = batch.scalars[name][place]
                raw_CHW = maps_BCHW[place] * sigma + mu
                views = cache.features([key])[own][0, int(is_mirrored) :: 2]
                # The size of a batch changes the last bits of the decoder's product.
                assert min((raw_CHW - view).norm() / view.norm() for view in views) < 1e-5
    return served


def test_every_image_has_the_features_of_all_its_teachers(
    scene_cache: Path, vit_cache: Path
) -> None:
    """Rows are matched by key, though the caches' orders differ; flips match; images come once."""
    source = source_of(scene_cache, vit_cache)
    assert source.names == [
        "cache/t150/stride4",
        "cache/t150/stride8",
        "vit/t0/block2",
        "vit/t0/block4",
    ]
    keys = require_own_features(source, scene_cache, vit_cache)
    assert len(set(keys)) == len(keys) == 16  # 20 of 40 are held out, of 20 two batches are full
    swapped = source_of(vit_cache, scene_cache)
    assert require_own_features(swapped, scene_cache, vit_cache) != keys


def test_draws_of_each_teacher_are_used(
    scene_folder: Path, scene_cache: Path, teacher_dir: Path, vit_cache: Path, tmp_path: Path
) -> None:
    """A cache with three draws beside one of a single draw has six views; each epoch uses all."""
    drawn = tmp_path / "drawn.cache"
    extract(scene_folder, drawn, quick_extraction(teacher_dir, draws=3, quality="fp16"))
    source = source_of(drawn, vit_cache)
    require_own_features(source, drawn, vit_cache)
    assert source._cache.num_views == 6
    cache = Cache(drawn)
    key = cache[0].key
    row = source.keys(np.arange(40)).index(key)
    maps = [
        source.decode(source._cache.batch([row], [view], source.names))["drawn/t150/stride8"]
        for view in range(6)
    ]
    assert len({x.numpy().tobytes() for x in maps}) == 6


def test_two_teachers_train_a_head_per_tap_and_resume_to_the_bit(
    scene_cache: Path, vit_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics, summary, run and report name the teacher; the loss is a mean over teachers."""
    caches = (scene_cache, vit_cache)
    result = run("train", *caches, "--out", tmp_path / "a", *FLAGS)
    assert result.exit_code == 0, result.output
    assert "teacher vit: timm:vit_tiny_patch16_224, t0/block2, t0/block4" in result.output
    lines = read_metrics(tmp_path / "a")
    for line in (line for line in lines if "loss" in line):
        own = [
            np.mean([line[f"mse/cache/t150/{tap}"] for tap in ("stride4", "stride8")]),
            np.mean([line[f"mse/vit/t0/{tap}"] for tap in ("block2", "block4")]),
        ]
        assert [line["teacher/cache"], line["teacher/vit"]] == pytest.approx(own, rel=1e-5)
        assert line["loss"] == pytest.approx(np.mean(own), rel=1e-5)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert {"teacher/cache", "teacher/vit", "mse/vit/t0/block4"} <= set(summary["held_out"])
    assert summary["noise_floor"]["vit/t0/block4"] == 0.0
    recorded = json.loads((tmp_path / "a" / "run.json").read_text())["caches"]
    assert recorded["vit"] == [CacheReader(vit_cache).data_identity]
    report = dtcache.inspect(tmp_path / "a").reports[0]
    assert report["taps"] == [*source_of(*caches).names]

    refused = run("train", scene_cache, "--out", tmp_path / "a", *FLAGS)
    assert refused.exit_code != 0 and "holds a run with another `cache`" in refused.output
    drop = replace(OPTIONS, teacher_dropping=0.5, teacher_weights="vit=2")
    train(caches, tmp_path / "whole", drop)
    interrupt(monkeypatch, Trainer, "update", call=3)
    with pytest.raises(KeyboardInterrupt):
        train(caches, tmp_path / "cut", drop)
    train(caches, tmp_path / "cut", drop)
    dropped = read_metrics(tmp_path / "whole")
    assert [line["loss"] for line in dropped if "loss" in line] == [
        line["loss"] for line in read_metrics(tmp_path / "cut") if "loss" in line
    ]
    kept = [line["kept/vit"] + line["kept/cache"] for line in dropped if "kept/vit" in line]
    assert all(1.0 <= share <= 2.0 for share in kept) and 1.0 < np.mean(kept) < 2.0
    ends = [(tmp_path / name / "backbone" / "model.safetensors") for name in ("whole", "cut")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_the_same_cache_twice_equals_it_once(scene_cache: Path, tmp_path: Path) -> None:
    """The first loss is equal to the bit; later ones differ by Adam's epsilon in the heads alone.

    Both heads of a tap start from the same weights, and the mean of two equal losses is the loss.
    """
    run_of = {}
    for name, caches in (("once", [scene_cache]), ("twice", [scene_cache, scene_cache])):
        train(caches, tmp_path / name, OPTIONS)
        run_of[name] = [line for line in read_metrics(tmp_path / name) if "loss" in line]
    assert run_of["once"][0]["loss"] == run_of["twice"][0]["loss"]
    for once, twice in zip(run_of["once"], run_of["twice"], strict=True):
        assert twice["loss"] == pytest.approx(once["loss"], rel=1e-3)
        assert twice["teacher/cache"] == pytest.approx(twice["teacher/cache-2"], rel=1e-6)


def test_parts_of_a_teacher_are_one_cache_of_all_images(
    halves: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part keeps its codec; an epoch serves every image once; a resume is exact."""
    source = source_of(*halves, limit=None, shuffle="block")
    assert source.names == ["t150/stride4", "t150/stride8"]
    keys = require_own_features(source, *halves)
    assert len(set(keys)) == len(keys) == 16
    parts = [{s.key for s in Cache(path)} for path in halves]
    assert all(set(keys) & part for part in parts)
    assert len(source._cache.usable) == 40
    train(halves, tmp_path / "whole", OPTIONS)
    interrupt(monkeypatch, Trainer, "update", call=3)
    with pytest.raises(KeyboardInterrupt):
        train(halves, tmp_path / "cut", OPTIONS)
    train(halves, tmp_path / "cut", OPTIONS)
    ends = [(tmp_path / name / "backbone" / "model.safetensors") for name in ("whole", "cut")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    recorded = json.loads((tmp_path / "cut" / "run.json").read_text())["caches"]
    assert recorded == {"": [CacheReader(path).data_identity for path in halves]}


def test_parts_hold_the_samples_of_a_whole_cache(halves: list[Path], scene_cache: Path) -> None:
    """The same keys are held out whether the images lie in one cache or in parts."""
    held = [
        sorted(source.keys(np.concatenate([b.rows for b in source.held_out()])))
        for source in (source_of(*halves), source_of(scene_cache))
    ]
    assert held[0] == held[1]


def test_failed_samples_are_left_out_and_counted(
    scene_folder: Path,
    scene_cache: Path,
    vit: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A sample that one cache lacks trains no teacher; the run says how many there are."""
    folder = tmp_path / "images"
    shutil.copytree(scene_folder, folder)
    broken = sorted(path for path in folder.rglob("*.png"))[3]
    broken.write_bytes(b"no image")
    changes = {**VIT_CHANGES, "quality": "fp16"}
    extract(folder, tmp_path / "vit.cache", quick_extraction(Path(vit), **changes))
    source = source_of(scene_cache, tmp_path / "vit.cache")
    said = " ".join(capsys.readouterr().err.split())
    assert "1 samples are left out, as not every cache has features of them" in said
    usable = source.keys(source._cache.usable.array())
    assert len(usable) == 39 and broken.relative_to(folder).as_posix() not in usable


@pytest.fixture(scope="module")
def others(
    scene_folder: Path, teacher_dir: Path, vit: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Caches that do not go with that of the scenes, by what differs."""
    root = tmp_path_factory.mktemp("others")
    elsewhere = root / "elsewhere"
    shutil.copytree(scene_folder, elsewhere / "moved")  # other keys
    changed = root / "changed"
    shutil.copytree(scene_folder, changed)
    first, second, *_ = sorted(path for path in changed.rglob("*.png"))
    shutil.copy(second, first)
    made: dict[str, tuple[Path, str | Path, dict[str, Any]]] = {
        "unflipped": (scene_folder, teacher_dir, {"flip": False, "limit": 8}),
        "small": (scene_folder, vit, {**VIT_CHANGES, "size": "24", "taps": "block2", "limit": 8}),
        "stretched": (scene_folder, vit, {**VIT_CHANGES, "resize_mode": "stretch", "limit": 8}),
        "some": (scene_folder, vit, {**VIT_CHANGES, "limit": 25}),
        "elsewhere": (elsewhere, vit, {**VIT_CHANGES, "limit": 8}),
        "early": (elsewhere, teacher_dir, {"timestep": (50,), "limit": 8}),
        "changed": (changed, vit, VIT_CHANGES),
    }
    for name, (images, teacher, changes) in made.items():
        options = quick_extraction(Path(teacher), **{"quality": "fp16", **changes})
        extract(images, root / f"{name}.cache", options)
    return {name: root / f"{name}.cache" for name in made}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unflipped", "unflipped.cache: expected `flips` True, as in .*cache, got False"),
        ("small", "small.cache: expected `height` 32, as in .*, got 24"),
        ("stretched", "stretched.cache: expected `resize_mode` crop, as in .*, got stretch"),
        ("some", "some.cache: 25 of its 25 images are among the 40 of .*the same images"),
        (
            "elsewhere",
            "elsewhere.cache have no image in common, and are of different teachers. Expec",
        ),
        ("early", r"early.cache have no .* \(the weights are the same, `timesteps` differs\)"),
        ("changed", "changed.cache: 1 of its images have other contents than in .*, such as "),
    ],
)
def test_caches_that_do_not_belong_together_are_refused(
    name: str, message: str, scene_cache: Path, others: dict[str, Path], tmp_path: Path
) -> None:
    """One line names the cache, the field or the count; nothing is begun."""
    with pytest.raises(CacheMismatchError, match=message) as caught:
        train([scene_cache, others[name]], tmp_path / "run", OPTIONS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--taps stride16", "--taps stride16: "),
        ("--taps stride4", "vit.cache has none of them, only block2, block4"),
        ("--taps 4,block2,block9", "--taps block9: no cache has this tap"),
        ("--timestep 20", "--timestep 20: the cache has 150"),
        ("--teacher-weights dino=2", "--teacher-weights dino: expected one of the teachers, cache"),
        ("--images .", "--images: expected caches without images"),
        ("--teacher-dropping 1.5", "--teacher-dropping 1.5: expected at most 1"),
        ("--allow-incomplete --labels none", "none"),
    ],
)
def test_options_that_do_not_fit_several_caches_are_refused(
    flags: str, message: str, scene_cache: Path, vit_cache: Path, tmp_path: Path
) -> None:
    """One line names the option; nothing is begun."""
    out = tmp_path / "run"
    result = run("train", scene_cache, vit_cache, "--out", out, *FLAGS, *words(flags))
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output and not out.exists()


def test_taps_choose_among_all_teachers(scene_cache: Path, vit_cache: Path) -> None:
    """A tap counts for the teachers that have it; a timestep for those that take noise."""
    source = source_of(scene_cache, vit_cache, taps="8,block2", timestep=150)
    assert source.names == ["cache/t150/stride8", "vit/t0/block2"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda caches, out: dtcache.train([], out), "`where`: expected one or more caches"),
        (
            lambda caches, out: dtcache.train(cast(Any, 3), out),
            "`where` 3: expected a cache or a list",
        ),
        (
            lambda caches, out: dtcache.train(caches, out, teacher="x", timestep=1),
            "`teacher`: expected one source of images with a teacher in the loop, got 2",
        ),
    ],
)
def test_the_library_names_the_argument(
    call: Callable[[list[Path], Path], object],
    message: str,
    scene_cache: Path,
    vit_cache: Path,
    tmp_path: Path,
) -> None:
    """`dtcache.train` takes a list of caches, and refuses anything else in one line."""
    with pytest.raises(dtcache.DtcacheError, match=message):
        call([scene_cache, vit_cache], tmp_path / "run")
    assert not (tmp_path / "run").exists()
