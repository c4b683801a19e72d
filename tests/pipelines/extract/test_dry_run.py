"""The dry run's forecast, and the check of disk space before an extraction."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import pipelines.size_estimate as space_module
from cli import main
from dtcache.errors import CacheMismatchError, ConfigError, DiskError
from dtcache.images import open_source
from dtcache.options import ExtractOptions
from dtcache.store.summary import inspect_cache
from dtcache.teacher import CallableTeacher
from pipelines.extract.dry_run import Forecast, forecast, render_forecast
from pipelines.extract.extract import extract
from pipelines.extract.open_writer import image_bytes
from pipelines.extract.plan import make_plan

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def options(teacher_dir: Path) -> ExtractOptions:
    """Return options of small sizes."""
    return ExtractOptions(
        teacher=str(teacher_dir),
        device="cpu",
        precision="fp32",
        batch_size=8,
        bytes_per_image=4608,
        shard_rows=8,
    )


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let every disk report this many free bytes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, count))


def test_a_dry_run_writes_nothing_and_forecasts_the_bytes(
    scene_folder: Path, options: ExtractOptions, tmp_path: Path
) -> None:
    """The dry run forecasts features within a tenth and images within a third, and writes nothing.

    The images are few and vary in size, so two batches of them predict the total only roughly.
    """
    found = forecast(scene_folder, tmp_path / "cache", options)
    assert not (tmp_path / "cache").exists()
    extract(scene_folder, tmp_path / "cache", options)
    report = inspect_cache(tmp_path / "cache")
    real = report["bytes_per_image"] * found.images
    assert found.feature_bytes == pytest.approx(real, rel=0.1)
    images = sum(
        p.stat().st_size for p in (tmp_path / "cache" / "data.zarr" / "images").rglob("c.*")
    )
    assert found.image_bytes == pytest.approx(images, rel=1 / 3)
    assert (found.images, found.views, found.batch_size) == (report["num_images"], 2, 8)
    assert found.seconds > found.fit_seconds > 0
    assert 0 < found.teacher_share <= 1
    # The cache computes both flips once; an online teacher computes one view per epoch.
    assert found.payback_epochs > 2


def test_the_truncated_pass_is_a_part_of_the_whole(
    scene_folder: Path, options: ExtractOptions, tmp_path: Path
) -> None:
    """Without the finest taps the truncated pass costs less, and the full pass costs the same."""
    coarse = forecast(
        scene_folder, tmp_path / "c", replace(options, taps="8", limit=8, bytes_per_image=None)
    )
    every = forecast(scene_folder, tmp_path / "c", replace(options, limit=8))
    assert coarse.full_flops is not None
    assert coarse.full_flops == every.full_flops
    assert coarse.flops < every.flops <= every.full_flops


def test_the_command_prints_it(scene_folder: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """--dry-run prints time, cache, disk, memory and break-even, and creates no folder."""
    flags = [
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--batch-size",
        "8",
        "--limit",
        "8",
        "--dry-run",
    ]
    out = tmp_path / "cache"
    arguments = [
        "extract",
        str(scene_folder),
        "--teacher",
        str(teacher_dir),
        "--out",
        str(out),
        *flags,
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    for word in (
        "8 images, 2 views each",
        "codec fit",
        "teacher busy",
        "features",
        "free, fits",
        "views per pass",
        "pays",
    ):
        assert word in result.output
    assert not out.exists()


def test_a_disk_that_is_too_small_is_told_of() -> None:
    """The table warns if the cache does not fit on the disk."""
    found = Forecast(
        images=1000,
        views=2,
        batch_size=32,
        views_per_second=10.0,
        teacher_share=0.9,
        fit_seconds=60.0,
        seconds=7300.0,
        feature_bytes=4e9,
        image_bytes=1e9,
        spool_bytes=1 << 20,
        free_bytes=5 * 10**9,
        memory_bytes=1 << 30,
        flops=10**9,
        full_flops=None,
        payback_epochs=2.4,
    )
    cells = [str(cell) for column in render_forecast(found).columns for cell in column._cells]
    assert any("DOES NOT FIT" in cell for cell in cells)
    assert "2 h 2 min, codec fit 60 s of it" in cells


def test_an_extraction_refuses_a_full_disk(
    scene_folder: Path, options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extraction without enough disk space is refused, unless `skip_disk_check` is set."""
    free(monkeypatch, 1000)
    with pytest.raises(
        DiskError,
        match=r"expected .* KiB free for this cache, found 1000 B; .*`skip_disk_check=True`",
    ):
        extract(scene_folder, tmp_path / "cache", options)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    done = extract(scene_folder, tmp_path / "cache", replace(options, skip_disk_check=True))
    assert done.num_done > 0


def test_no_image_is_sized_where_none_is_stored(
    scene_folder: Path, options: ExtractOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With --no-store-images the forecast and the disk check count no bytes for images."""
    monkeypatch.setattr(space_module, "encode_stored", lambda *a: b"x" * 10**6)
    bare = replace(options, store_images=False, limit=8)
    assert forecast(scene_folder, tmp_path / "c", bare).image_bytes == 0
    plan = make_plan(open_source(scene_folder), bare)
    assert image_bytes(plan) == 0
    assert (
        image_bytes(make_plan(open_source(scene_folder), replace(bare, store_images=True))) == 10**6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 2, "scheduler": "tcp://h:1"}, "`workers` 2 starts a cluster"),
        ({"shard_rows": 2**21}, "`shard_rows` 2097152: expected at most"),
        ({"taps": "64"}, "`taps` stride64: the teacher has no such map"),
    ],
)
def test_a_dry_run_refuses_what_a_start_refuses(
    scene_folder: Path,
    options: ExtractOptions,
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
) -> None:
    """A dry run refuses bad options and a foreign output folder as an extraction does."""
    with pytest.raises(ConfigError, match=message):
        forecast(scene_folder, tmp_path / "c", replace(options, **changes))
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CacheMismatchError, match=r"is not empty and not a cache: found thesis.tex"):
        forecast(scene_folder, tmp_path, options)


def test_a_module_whose_operations_cannot_be_counted_is_forecast_without(
    scene_folder: Path, tmp_path: Path
) -> None:
    """If FLOPs cannot be counted, the forecast succeeds without them."""

    class Reading(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.sum().item() > -1e9
            return super().forward(x)

    teacher = CallableTeacher(
        Reading(3, 4, 3, padding=1), taps={"stride1": ""}, version="1", size=(32, 32)
    )
    options = ExtractOptions(timestep=(0,), device="cpu", precision="fp32", batch_size=8, limit=8)
    found = forecast(scene_folder, tmp_path / "c", options, teacher)
    assert found.flops is None
    assert found.views_per_second > 0
    assert "GFLOP" not in str([list(column.cells) for column in render_forecast(found).columns])
