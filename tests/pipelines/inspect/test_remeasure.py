"""The codec's error remeasured, and a student next to its teacher, against the recorded values."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from store.builders import FEATURES, tree
from support.cli import run
from support.inspecting import documented

from dtcache.cache.cache import Cache
from dtcache.errors import CacheDamagedError
from dtcache.options import InspectOptions
from pipelines.inspect.statistics.remeasure import remeasure

SMALL = ("--precision", "fp32", "--device", "cpu", "--batch-size", "8")


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Save statistics in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(scope="module")
def cache(scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 16 scenes in two draws, without images."""
    out = tmp_path_factory.mktemp("afresh") / "cache"
    more = ("--limit", 16, "--no-store-images", "--quality", "high", "--draws", 2)
    result = run("extract", scene_folder, "--teacher", teacher_dir, "--out", out, *SMALL, *more)
    assert result.exit_code == 0, result.output
    return out


def test_the_error_is_the_one_that_extraction_recorded(
    cache: Path, scene_folder: Path, teacher_dir: Path
) -> None:
    """The remeasured error is near the recorded error, and the worst samples come first."""
    options = InspectOptions(images=scene_folder, device="cpu")
    found = remeasure(cache, str(teacher_dir), options)
    sums = Cache(cache).reader.manifest.sums
    assert sorted(found.rows) == list(range(16))
    for name, estimate in found.error.items():
        recorded = sums[name].squared_error / sums[name].energy
        assert estimate.value == pytest.approx(recorded, rel=0.25)
        assert estimate.low == estimate.high == estimate.value  # all samples were measured
    mean = np.mean([found.errors[name] for name in found.errors], 0)
    assert [mean[place] for place in found.worst()] == sorted(mean, reverse=True)
    shown = found.to_json()
    assert [entry["key"] for entry in shown["worst"]] == [
        found.keys[place] for place in found.worst()[:10]
    ]
    fields = [f"afresh.{name}" for name in shown] + [
        f"afresh.worst[].{name}" for name in shown["worst"][0]
    ]
    assert sorted(fields) == [
        name for name in documented("statistics") if name.startswith("afresh.")
    ]


def test_the_teacher_is_not_asked_of_what_cannot_be_read(tiny_copy: Path) -> None:
    """If no sample is readable at every tap, the error is raised before a teacher is loaded."""
    for path in (tiny_copy / "data.zarr" / FEATURES).glob("c.*"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(
        CacheDamagedError,
        match="none of the samples for the teacher can be read at every tap; run",
    ):
        remeasure(tiny_copy, "nowhere", InspectOptions())


@pytest.mark.slow
def test_a_page_has_originals_and_the_worst(
    cache: Path, scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """With a teacher each decoded map is shown with its original, and the worst samples first."""
    out = tmp_path / "out.html"
    more = ("--images", scene_folder, "--device", "cpu", "--report", out, "--gallery", 3)
    before = tree(cache)
    result = run("inspect", cache, "--teacher", teacher_dir, *more)
    assert result.exit_code == 0, result.output
    assert tree(cache) == before
    page = out.read_text()
    assert page.count(', original"') == 4 * 3 + 4 * 6
    assert len(re.findall(r"<small>error \d\.\d\d</small>", page)) == 4 * 6
    # The cache has two draws as views: the noise share is measured from them.
    report = json.loads(run("inspect", cache, "--stats", "--json").stdout)
    for tap in report["statistics"]["taps"]:
        assert tap["noise_share_from"] == "draws"
        assert 0 < tap["noise_share"]["value"] < 1


def test_what_does_not_fit_is_refused(
    cache: Path, scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """A teacher is refused without images or for two caches; a page without images says so."""
    result = run("inspect", cache, "--teacher", teacher_dir, "--device", "cpu")
    assert (
        result.exit_code == 2
        and "stores no images: pass --images, the source that it was extracted from"
        in result.output
    )
    result = run("inspect", cache, cache, "--teacher", teacher_dir)
    assert "--teacher: expected one cache, since each cache has its own teacher" in result.output
    assert run("inspect", cache, "--report", tmp_path / "x.html").exit_code == 0
    assert "pass --images to see them" in (tmp_path / "x.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("average", [(), ("--ema-decay", 0.5)])
def test_a_student_stands_beside_its_teacher(
    cache: Path, scene_folder: Path, tmp_path: Path, average: tuple[object, ...]
) -> None:
    """The pictures' errors average to the held-out MSE recorded for the exported weights.

    The exported weights are the EMA or the last weights. A different cache is refused.
    """
    result = run(
        "train",
        cache,
        "--student",
        "resnet10t",
        "--epochs",
        1,
        "--warmup-epochs",
        0.5,
        "--batch-size",
        4,
        "--fpn-width",
        8,
        "--images",
        scene_folder,
        "--out",
        tmp_path / "run",
        "--precision",
        "fp32",
        "--device",
        "cpu",
        *average,
    )
    assert result.exit_code == 0, result.output
    more = ("--images", scene_folder, "--device", "cpu", "--report", tmp_path / "run.html")
    before = tree(cache), tree(tmp_path / "run")
    result = run("inspect", tmp_path / "run", "--cache", cache, *more)
    assert result.exit_code == 0, result.output
    assert (tree(cache), tree(tmp_path / "run")) == before
    errors = [
        float(e)
        for e in re.findall(r"<small>MSE (\d+\.\d\d)</small>", (tmp_path / "run.html").read_text())
    ]
    held = json.loads((tmp_path / "run" / "summary.json").read_text())["held_out"]
    wanted = [value for name, value in held.items() if name.startswith("mse/")]
    assert len(errors) == 4 * 8  # half of the 16 samples are held out
    assert np.mean(errors) == pytest.approx(np.mean(wanted), abs=0.01)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    os.makedirs(tmp_path / "other")
    (tmp_path / "other" / "run.json").write_text(json.dumps(record | {"cache": "ab" * 32}))
    result = run("inspect", tmp_path / "other", "--cache", cache, *more)
    assert (
        "not the cache that" in result.output
        and "expected fingerprint abababababababab" in result.output
    )
    (tmp_path / "other" / "run.json").write_text(json.dumps(record))
    assert (
        "no checkpoint yet; the student's features need one"
        in run("inspect", tmp_path / "other", "--cache", cache, *more).output
    )
