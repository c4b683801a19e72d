"""Statistics against NumPy over all values, damaged samples, and which bytes are read and saved."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from store.builders import (
    COARSE,
    FAILED_ROW,
    FEATURES,
    FINE,
    ROWS,
    SHARD_ROWS,
    VIEWS,
    begin,
    tiny_plan,
    tree,
    write_cache,
)
from support.files import flip
from support.inspecting import inspect

from dtcache.cache.cache import Cache
from dtcache.errors import CacheIncompleteError, ConfigError
from dtcache.options import InspectOptions
from pipelines.inspect.statistics import cache_statistics
from pipelines.inspect.statistics.decode import decode
from pipelines.inspect.statistics.disk_cache import statistics_folder
from pipelines.inspect.statistics.limits import GROUPS, MEMORY, Limits, rows_at_once
from pipelines.inspect.statistics.sums import add, group_of, rings_of

pytestmark = pytest.mark.usefixtures("apart")

GOOD = np.array([row for row in range(ROWS) if row != FAILED_ROW])


def test_exact_statistics_are_those_of_all_values(tiny_cache: Path) -> None:
    """Statistics of all samples equal NumPy's over all values, with intervals of width zero."""
    found = cache_statistics(tiny_cache, InspectOptions(exact=True))
    cache = Cache(tiny_cache)
    assert (found["num_rows"], found["num_usable"], found["exact"], found["left_out"]) == (
        9,
        9,
        True,
        {},
    )
    for tap, name in zip(found["taps"], (FINE, COARSE), strict=True):
        raw = cache.raw([name], GOOD)[name].double().numpy()
        for key, value in (("mean", raw.mean()), ("std", raw.std())):
            assert tap[key]["value"] == pytest.approx(value, rel=1e-5)
            assert tap[key]["low"] == tap[key]["high"] == tap[key]["value"]
        whitened = decode(cache, name, GOOD).whitened_RVCHW.double().numpy()
        flat = np.moveaxis(whitened, 2, 0).reshape(whitened.shape[2], -1)
        eigenvalues = np.linalg.eigvalsh(np.cov(flat, bias=True)).clip(0)
        share = eigenvalues / eigenvalues.sum()
        entropy = -sum(s * np.log(s) for s in share if s > 0)
        assert tap["effective_rank"]["value"] == pytest.approx(np.exp(entropy), rel=1e-4)
        assert tap["dead_channels"]["value"] == np.mean(flat.var(1) <= 1e-4 * flat.var(1).mean())
        edges = np.array(found["histogram_edges"])
        assert (
            tap["histogram"] == np.histogram(whitened.clip(edges[0], edges[-1]), edges)[0].tolist()
        )
        np.testing.assert_allclose(tap["spectrum"]["components"], eigenvalues[::-1], atol=1e-6)


def test_the_spectrum_is_parsevals(tiny_cache: Path) -> None:
    """The rings add up to the energy about the codec's mean, and ring 0 is the map's mean."""
    cache = Cache(tiny_cache)
    group = group_of(cache, FINE, GOOD)
    centred = (
        decode(cache, FINE, GOOD).whitened_RVCHW
        - torch.from_numpy(cache.fit[FINE].mean).float()[:, None, None]
    )
    assert group.sums.rings.sum() == pytest.approx(float(centred.double().square().sum()), rel=1e-5)
    assert group.sums.rings[0] == pytest.approx(
        float(centred.double().mean((3, 4)).square().sum()) * 16, rel=1e-5
    )
    assert rings_of(2, 4).tolist() == [[0, 1, 2, 3], [2, 2, 2, 3]]


def test_sums_of_groups_add_up(tiny_cache: Path) -> None:
    """The sums of two groups add up to those of one group of all rows."""
    cache = Cache(tiny_cache)
    parts = add([group_of(cache, COARSE, GOOD[:4]).sums, group_of(cache, COARSE, GOOD[4:]).sums])
    whole = group_of(cache, COARSE, GOOD).sums
    assert (
        (parts.rows, parts.maps, parts.coded)
        == (whole.rows, whole.maps, whole.coded)
        == (9, 18, whole.coded)
    )
    np.testing.assert_allclose(parts.products_CC, whole.products_CC, rtol=1e-9)


def test_escapes_are_counted(tiny_cache: Path) -> None:
    """Escapes are counted as the values beyond the half width of their symbol table."""
    cache = Cache(tiny_cache)
    sums = group_of(cache, FINE, GOOD).sums
    fit = cache.fit[FINE]
    classes = fit.classes.ravel()[fit.live]
    half = fit.half_width[fit.class_table[classes]].astype(int)
    values = tiny_plan().values[FINE][GOOD].astype(int)
    assert sums.escaped == (np.abs(values) > half).sum()
    assert (sums.saturated, sums.coded) == (0, values.size)


def test_a_damaged_sample_is_left_out_and_named(tiny_cache: Path, tiny_copy: Path) -> None:
    """A flipped bit removes one sample of every tap, and the remaining statistics are not saved."""
    flip(tiny_copy / f"data.zarr/{FEATURES}/c.1.0.0")
    found = cache_statistics(tiny_copy, InspectOptions(exact=True))
    key = tiny_plan().samples[4].key
    assert list(found["left_out"]) == [f"{FINE} of {key}", f"{COARSE} of {key}"]
    assert "the checksum does not match" in found["left_out"][f"{FINE} of {key}"]
    rest = GOOD[GOOD != 4]
    assert found["taps"][0]["mean"]["value"] == pytest.approx(
        float(Cache(tiny_cache).raw([FINE], rest)[FINE].double().mean()), rel=1e-5
    )
    assert not statistics_folder().exists()
    assert f"left out: {FINE} of {key}" in " ".join(inspect(tiny_copy, "--stats").output.split())


def cache_of(views: int = 2, **shapes: tuple[int, int, int]) -> Any:
    """Return what limits depend on: the views and shapes of a cache."""
    manifest = SimpleNamespace(num_views=views)
    reader = SimpleNamespace(manifest=manifest)
    return SimpleNamespace(names=list(shapes), shape=shapes.__getitem__, reader=reader)


def test_memory_is_bounded_whatever_the_shapes() -> None:
    """Usual maps have all groups; wide ones have fewer; a map of 2^26 values is left out."""
    usual = cache_of(a=(1280, 16, 16), b=(640, 64, 64))
    limits = Limits.of(usual)
    assert (limits.groups, limits.left_out) == (GROUPS, {})
    assert limits.pooled_rows > 100 and limits.threads(usual, "b") >= 1
    wide = cache_of(a=(2560, 8, 8))
    limits = Limits.of(wide)
    assert 2 <= limits.groups < GROUPS and limits.groups * 8 * 2560**2 < MEMORY
    assert limits.threads(wide, "a") == 1
    large = cache_of(a=(64, 1024, 1024), b=(64, 8, 8), c=(1 << 26, 1, 1))
    limits = Limits.of(large)
    assert list(limits.left_out) == ["a", "c"] and limits.groups == GROUPS
    reason = (
        r"^statistics of maps 64x1024x1024 of 2 views would take 4\.\d GB; expected at most 0\.6"
    )
    assert re.search(reason, limits.left_out["a"])
    assert rows_at_once(large) == 0 and rows_at_once(usual) > 3
    many = cache_of(views=64, **{f"a{number}": (256, 1, 1) for number in range(4096)})
    limits = Limits.of(many)
    assert limits.pooled_rows * limits.groups * 4096 * 256 * 4 <= MEMORY


def test_a_cache_of_too_many_values_is_refused(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal comes from the manifest, before an array of the codec is read."""
    cache = Cache(tiny_cache)
    values = sum(int(np.prod(cache.shape(name))) for name in cache.names)
    monkeypatch.setattr("pipelines.inspect.statistics.limits.MAX_VALUES", values)
    assert cache_statistics(tiny_cache, InspectOptions(exact=True))["exact"]
    monkeypatch.setattr("pipelines.inspect.statistics.limits.MAX_VALUES", values - 1)
    monkeypatch.setattr("pipelines.inspect.statistics.compute.Cache", None)
    with pytest.raises(ConfigError, match=f"have {values} values per view; expected at most"):
        cache_statistics(tiny_cache, InspectOptions(exact=True))


def test_an_array_that_is_too_large_is_left_out_and_named(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics of the other arrays are the same, and every report can be written."""
    usual = cache_statistics(tiny_cache, InspectOptions(exact=True))
    too_large = Limits(groups=GROUPS, pooled_rows=500, left_out={FINE: "too large"})
    monkeypatch.setattr(Limits, "of", lambda cache: too_large)
    monkeypatch.setattr("pipelines.inspect.page.gallery.rows_at_once", lambda cache: 0)
    statistics_folder().rename(tmp_path / "saved")
    found = cache_statistics(tiny_cache, InspectOptions(exact=True))
    assert found["left_out"] == {FINE: "too large"}
    assert found["taps"][0]["mean"] is None and found["taps"][0]["histogram"] == []
    assert found["taps"][1] == usual["taps"][1]
    assert found["cka"]["value"] == [[1.0, None], [None, 1.0]]
    result = inspect(tiny_cache, "--stats", "--report", tmp_path / "page.html")
    assert f"left out: {FINE}: too large" in " ".join(result.output.split())
    assert "too large" in (tmp_path / "page.html").read_text()


def test_a_lost_shard_is_left_out_and_named(tiny_copy: Path) -> None:
    """Rows of a missing shard file are not sampled, and the file is named."""
    (tiny_copy / f"data.zarr/{FEATURES}/c.0.0.0").unlink()
    found = cache_statistics(tiny_copy, InspectOptions())
    assert found["num_usable"] == 5
    assert found["left_out"] == {str(tiny_copy / f"data.zarr/{FEATURES}/c.0.0.0"): "no file"}


@pytest.mark.parametrize("shards", [(1,), (0, 1, 2)])
def test_a_shard_of_rubbish_is_left_out_and_named(tiny_copy: Path, shards: tuple[int, ...]) -> None:
    """Corrupted shard files remove their rows of every tap, and each sample is named.

    If all files of a timestep are corrupted, its taps have no statistics.
    """
    for shard in shards:
        path = tiny_copy / f"data.zarr/{FEATURES}/c.{shard}.0.0"
        path.write_bytes(bytes(path.stat().st_size))
    rows = [row for row in GOOD if row // SHARD_ROWS in shards]
    found = cache_statistics(tiny_copy, InspectOptions(exact=True))
    assert set(found["left_out"]) == {
        f"{name} of {tiny_plan().samples[row].key}" for name in (FINE, COARSE) for row in rows
    }
    rest = [row for row in GOOD if row not in rows]
    cache = Cache(tiny_copy)
    for tap, name in zip(found["taps"], (FINE, COARSE), strict=True):
        if rest:
            assert tap["mean"]["value"] == pytest.approx(
                float(cache.raw([name], rest)[name].double().mean()), rel=1e-5
            )
        else:
            assert (tap["mean"], tap["spectrum"], tap["histogram"]) == (None, None, [])
    output = " ".join(inspect(tiny_copy, "--exact").output.split())
    count = 2 * len(rows)
    assert "left out" in output and (
        count <= 5 or f"and {count - 5} more; the JSON report lists all" in output
    )


@pytest.mark.parametrize("flags", [("--stats",), ("--exact", "--json"), ("--report", "x.html")])
def test_what_has_no_statistics_is_refused_in_a_line(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """Statistics of no cache, of a newer format or of an empty cache are refused in one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    begin(tmp_path / "empty", tiny_plan())
    (tiny_copy / "manifest.json").write_text('{"format":3}')
    for root, code, message in (
        (
            tmp_path / "folder",
            2,
            "is not a cache: expected manifest.json in it; pass a folder made by dtcache extract",
        ),
        (tiny_copy, 1, "expected format 2, got 3; install the dtcache that wrote it"),
        (tmp_path / "empty", 1, "no sample has features yet; statistics need at least one"),
    ):
        result = inspect(root, *flags)
        assert result.exit_code == code
        assert message in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_an_unfinished_cache_has_statistics_of_what_is_there(tmp_path: Path) -> None:
    """An unfinished cache has statistics of its committed rows, if there are any."""
    plan = tiny_plan()
    root = tmp_path / "cache"
    writer = begin(root, plan)
    with pytest.raises(
        CacheIncompleteError, match="no sample has features yet; statistics need at least one"
    ):
        cache_statistics(root, InspectOptions())
    counts = []
    for shard in writer.missing:
        writer.write_shard(plan.shards[shard])
        before = tree(root)
        counts.append(cache_statistics(root, InspectOptions())["num_usable"])
        assert tree(root) == before
    assert counts == [4, 7, 9]


def test_statistics_are_kept_outside_of_the_cache(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics are saved outside the cache; other options or a damaged file recompute them."""
    before = tree(tiny_cache)
    first = cache_statistics(tiny_cache, InspectOptions(num_samples=6))
    [file] = statistics_folder().iterdir()
    assert file.name.startswith(Cache(tiny_cache).reader.manifest.identity[:32])
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.inspect.statistics.compute.group_sums", None)
        assert cache_statistics(tiny_cache, InspectOptions(num_samples=6)) == first
        with pytest.raises(TypeError):
            cache_statistics(tiny_cache, InspectOptions(num_samples=5))
    file.write_bytes(file.read_bytes().replace(b'"num_rows":6', b'"num_rows":7'))
    assert cache_statistics(tiny_cache, InspectOptions(num_samples=6)) == first
    assert tree(tiny_cache) == before


def test_a_folder_that_cannot_be_written_is_no_failure(
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If the user's cache folder is not writable, statistics are shown and not saved."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_statistics(tiny_cache, InspectOptions())["num_rows"] == 9
    assert "statistics are not saved" in capsys.readouterr().err


@pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the kernel counts no bytes read here"
)
def test_a_sample_is_all_that_is_read(tmp_path: Path) -> None:
    """A sample of two rows reads no more than the opening, the shard indices and its own chunks."""

    def bytes_read() -> int:
        counters = Path("/proc/self/io").read_text()
        return int(re.search(r"rchar: (\d+)", counters)[1])  # type: ignore[index]

    plan = tiny_plan()
    root = write_cache(tmp_path / "cache", plan)
    cache_statistics(root, InspectOptions(num_samples=3))  # performs lazy imports
    before = bytes_read()
    Cache(root, allow="damage")
    opening = bytes_read() - before
    before = bytes_read()
    cache_statistics(root, InspectOptions(num_samples=2))
    spent = bytes_read() - before
    before = bytes_read()
    cache_statistics(root, InspectOptions(exact=True))
    everything = bytes_read() - before
    length = plan.arrays[FEATURES].length
    index = sum(
        a.num_shards * (a.shard_rows * a.payloads_per_row * 16 + 4) for a in plan.arrays.values()
    )
    # A chunk is a payload in a frame: at most its length and 64 bytes. Each tap reads it.
    assert spent - 2 * opening <= 2 * VIEWS * 2 * (length + 64) + index + 2048
    assert everything - spent >= 5 * VIEWS * len(plan.payload(FEATURES, 0, 0))


def test_the_json_has_statistics(tiny_cache: Path) -> None:
    """--json --stats prints all statistics as JSON without NaN; the terminal shows every tap."""
    report = json.loads(inspect(tiny_cache, "--stats", "--json").stdout, parse_constant=pytest.fail)
    assert report["statistics"]["num_rows"] == 9
    assert report["statistics"]["cka"]["names"] == [FINE, COARSE]
    assert "all 9 of 9 samples" in inspect(tiny_cache, "--exact").output
    assert "a sample of 6 of 9 samples" in inspect(tiny_cache, "--stats", "--num-samples", 6).output


def test_recorded_measurements_are_shown(tmp_path: Path) -> None:
    """The codec's error is the manifest's, and with one draw the noise share is the fit's."""
    plan = tiny_plan()
    root = write_cache(tmp_path / "cache", replace(plan))
    found = cache_statistics(root, InspectOptions())["taps"][0]
    sums = Cache(root).reader.manifest.sums[FINE]
    assert found["codec_error"]["value"] == sums.squared_error / sums.energy
    assert (found["noise_share"]["value"], found["noise_share_from"]) == (0.1, "fit")
