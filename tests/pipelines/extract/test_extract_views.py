"""Views and sizes of a cache: draws, their mean, float16, and caches without images."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.cli import run, words

from dtcache.cache.cache import Cache
from dtcache.device import resolve_compute
from dtcache.errors import ConfigError
from dtcache.images import FolderSource, decode_view, load_views
from dtcache.options import ExtractOptions
from dtcache.recipe import Sample
from dtcache.teacher import TeacherSettings, load_teacher, prepare_teacher
from dtcache.whitening import whiten
from pipelines.evaluate.pooled_features import CacheFeatures
from pipelines.extract.plan import plan_rows

FLAGS = words("--precision fp32 --device cpu --batch-size 4 --shard-rows 8 --limit 12")


def extracted(images: Path, teacher: Path, out: Path, *more: object) -> Cache:
    """Extract with small constants and open the cache without images' source."""
    result = run("extract", images, "--teacher", teacher, "--out", out, *FLAGS, *more)
    assert result.exit_code == 0, result.output
    return Cache(out)


def wanted_maps(
    cache: Cache, images: Path, teacher: Path, row: int, draw: int, flip: bool
) -> dict[str, np.ndarray]:
    """Return a view's whitened features, computed by the teacher."""
    loaded = load_teacher(str(teacher))
    made = prepare_teacher(
        loaded,
        TeacherSettings(view=cache.view, timesteps=(150,), batch_size=4),
        resolve_compute("cpu", "fp32"),
    )
    source = FolderSource(images)
    key = cache.samples["key"][row].as_py()
    pixels = decode_view(source.read(source.keys.index(key)), cache.view)[0]
    (raw,) = made.features(made.batch([made.input(pixels, key, flip, seed=0, draws=[draw])]))
    return {name: whiten(maps)[0][0].numpy() for name, maps in raw.items()}


def decoded(cache: Cache, row: int, view: int) -> dict[str, np.ndarray]:
    """Return a view's decoded whitened features."""
    coefficients, _ = cache.coefficients([row], [view], cache.names)
    return {
        name: maps[0].numpy() for name, maps in cache.decoder(cache.names)(coefficients).items()
    }


def test_draws_are_views_draw_by_draw(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """View draw x flips + flip holds the teacher's float16 features of that draw and flip."""
    cache = extracted(scene_folder, teacher_dir, tmp_path / "c", "--draws", 2, "--quality", "fp16")
    assert cache.reader.manifest.num_views == 4
    for view, (draw, flip) in enumerate([(0, False), (0, True), (1, False), (1, True)]):
        wanted = wanted_maps(cache, scene_folder, teacher_dir, 3, draw, flip)
        for name, maps in decoded(cache, 3, view).items():
            np.testing.assert_allclose(maps, wanted[name], atol=4e-3)
        batch = cache.batch([3], [view], cache.names)
        plain = cache.images([3])[0]
        np.testing.assert_array_equal(
            batch.images_BCHW[0].numpy(), plain[:, :, ::-1] if flip else plain
        )


def test_averaged_draws_are_one_view(scene_folder: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """--average stores the mean of the draws' whitened features as one view per flip."""
    flags = ("--draws", 3, "--average", "--quality", "fp16")
    cache = extracted(scene_folder, teacher_dir, tmp_path / "c", *flags)
    assert cache.reader.manifest.num_views == 2
    draws = [wanted_maps(cache, scene_folder, teacher_dir, 5, draw, True) for draw in range(3)]
    for name, maps in decoded(cache, 5, 1).items():
        np.testing.assert_allclose(maps, np.mean([d[name] for d in draws], 0), atol=4e-3)


def test_an_average_has_less_noise(scene_folder: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """The fit measures less noise for the average of four draws than for one draw."""
    one = extracted(scene_folder, teacher_dir, tmp_path / "one", "--quality", "fp16")
    four = extracted(
        scene_folder, teacher_dir, tmp_path / "four", "--draws", 4, "--average", "--quality", "fp16"
    )
    floors = [cache.reader.manifest.recipe["codec"]["noise_floor"] for cache in (one, four)]
    assert all(floors[1][name] < 0.5 * floors[0][name] for name in one.names)


def test_float16_caches_say_so(scene_folder: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """inspect shows a ratio near 1, almost no error and no lost signal for a float16 cache."""
    extracted(scene_folder, teacher_dir, tmp_path / "c", "--quality", "fp16")
    report = json.loads(run("inspect", tmp_path / "c", "--json").stdout)
    assert 0.8 < report["ratio"] < 1.5
    assert all(
        tap["relative_mse"] < 1e-5 and tap["determined_error"] == 0 for tap in report["taps"]
    )
    assert report["recipe"]["codec"]["name"] == "float16"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--bytes-per-image", 10**6), "expected fewer than the 92160 bytes of float16"),
        (("--bytes-per-image", 900, "--quality", "small"), "and no --quality with it"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, flags: tuple[object, ...], message: str
) -> None:
    """Sizes that contradict the teacher's maps are refused in one line, and no cache is begun."""
    result = run(
        "extract", scene_folder, "--teacher", teacher_dir, "--out", tmp_path / "c", *FLAGS, *flags
    )
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_more_images_than_a_cache_holds_are_refused() -> None:
    """More shards than a reader accepts are refused with the option to change."""
    source = SimpleNamespace(keys=range(1_000_001), labels=None)
    with pytest.raises(
        ConfigError,
        match=r"1000001 images: expected at most 1000000; pass `limit`, or a larger `sh",
    ):
        plan_rows(source, None, ExtractOptions(shard_rows=1))


def test_a_size_that_loses_too_much_warns(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """A size that loses most of the signal gives a warning per tap, and the cache is written."""
    flags = (*FLAGS, "--bytes-per-image", 400)
    result = run("extract", scene_folder, "--teacher", teacher_dir, "--out", tmp_path / "c", *flags)
    assert result.exit_code == 0
    assert "of what the image determines; pass a higher quality" in result.output


def test_a_cache_without_images_trains_from_their_source(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """A --no-store-images cache trains from its source with the losses of stored images."""
    flags = (
        "--student",
        "resnet10t",
        "--epochs",
        1,
        "--warmup-epochs",
        0.5,
        "--batch-size",
        4,
        "--fpn-width",
        16,
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--student-size",
        32,
        "--taps",
        "4,8",
        "--log-every",
        1,
    )
    losses = {}
    for images in ("view", "none"):
        extracted(
            scene_folder,
            teacher_dir,
            tmp_path / images,
            "--store-images" if images == "view" else "--no-store-images",
            "--bytes-per-image",
            4608,
        )
        more = ("--images", scene_folder) if images == "none" else ()
        result = run("train", tmp_path / images, "--out", tmp_path / f"run-{images}", *flags, *more)
        assert result.exit_code == 0, result.output
        lines = (tmp_path / f"run-{images}" / "metrics.jsonl").read_text().splitlines()
        losses[images] = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert losses["view"] == losses["none"]
    assert len(losses["none"]) > 0
    assert not (tmp_path / "none" / "data.zarr" / "images").exists()
    result = run("train", tmp_path / "none", "--out", tmp_path / "run-without", *flags)
    assert result.exit_code == 2
    assert "stores no images; pass --images, the images it was extracted from" in result.output
    assert not (tmp_path / "run-without").exists()
    result = run(
        "train", tmp_path / "view", "--out", tmp_path / "run-both", *flags, "--images", scene_folder
    )
    assert result.exit_code == 2
    assert "stores its images: open it without --images" in result.output


def test_position_whitening_needs_exact_features(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """--whitening position is refused for a compressed cache."""
    extracted(scene_folder, teacher_dir, tmp_path / "c", "--bytes-per-image", 4608)
    flags = ("--whitening", "position", "--batch-size", 4)
    result = run("train", tmp_path / "c", "--out", tmp_path / "r", *flags)
    assert result.exit_code == 2
    assert (
        "--whitening position: expected a cache of exact features; extract it with quality fp16"
        in result.output
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("--draws", 2, "--average"),
        ("--draws", 2),
        ("--quality", "fp16"),
        ("--encoding", "ddim", "--ddim-steps", 2),
    ],
)
def test_the_teacher_recomputes_what_such_a_cache_holds(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    """evaluate gets equal features from the cache and, outside the cache, from its teacher."""
    cache = extracted(scene_folder, teacher_dir, tmp_path / "c", "--no-store-images", *flags)
    source = FolderSource(scene_folder)
    keys = cache.samples["key"].to_pylist()[:5]
    batch = list(
        load_views(source, [source.keys.index(key) for key in keys], cache.view, threads=1)
    )
    pooled = CacheFeatures(cache, str(teacher_dir), resolve_compute("cpu", "fp32"))
    samples = [Sample(index=0, key=key) for key in keys]
    stored = pooled(batch, samples)
    pooled.maps._row_of.clear()
    for name, vectors in pooled(batch, samples).items():
        torch.testing.assert_close(vectors, stored[name], atol=2e-3, rtol=0)
