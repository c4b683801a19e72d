"""Statistics against plain NumPy over everything, their intervals against the truth, and what is read and kept."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from inspecting import flip, inspect
from scipy.stats import special_ortho_group
from store.builders import COARSE, FAILED_ROW, FINE, ROWS, VIEWS, begin, tiny_plan, tree, write_cache

from dtcache.cache import Cache
from dtcache.errors import ConfigError
from dtcache.options import InspectOptions
from pipelines.statistics import cache_statistics, measures
from pipelines.statistics.estimate import jackknife, proportion
from pipelines.statistics.features import decode
from pipelines.statistics.kept import kept_folder
from pipelines.statistics.similarity import knn_accuracy, similarities
from pipelines.statistics.sums import Group, add, empty, group_of, rings_of

pytestmark = pytest.mark.usefixtures("apart")

GOOD = np.array([row for row in range(ROWS) if row != FAILED_ROW])


def test_exact_statistics_are_those_of_all_values(tiny_cache: Path) -> None:
    """Mean, std, effective rank, dead channels and histogram are NumPy's over every decoded value, without interval."""
    found = cache_statistics(tiny_cache, InspectOptions(exact=True))
    cache = Cache(tiny_cache)
    assert (found["num_rows"], found["num_usable"], found["exact"], found["left_out"]) == (9, 9, True, {})
    for tap, name in zip(found["taps"], (FINE, COARSE), strict=True):
        raw = cache.raw(name, GOOD).double().numpy()
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
        assert tap["histogram"] == np.histogram(whitened.clip(edges[0], edges[-1]), edges)[0].tolist()
        np.testing.assert_allclose(tap["spectrum"]["components"], eigenvalues[::-1], atol=1e-6)


def test_the_spectrum_is_parsevals(tiny_cache: Path) -> None:
    """Variance by ring, weighted by coefficients, adds up to that about the codec's mean; ring 0 is the map's mean."""
    cache = Cache(tiny_cache)
    group = group_of(cache, FINE, GOOD)
    centred = decode(cache, FINE, GOOD).whitened_RVCHW - torch.from_numpy(cache.fit[FINE].mean).float()[:, None, None]
    assert group.sums.rings.sum() == pytest.approx(float(centred.double().square().sum()), rel=1e-5)
    assert group.sums.rings[0] == pytest.approx(float(centred.double().mean((3, 4)).square().sum()) * 16, rel=1e-5)
    assert rings_of(2, 4).tolist() == [[0, 1, 2, 3], [2, 2, 2, 3]]


def test_sums_of_groups_add_up(tiny_cache: Path) -> None:
    """The sums of two groups together are those of one group of all rows."""
    cache = Cache(tiny_cache)
    parts = add([group_of(cache, COARSE, GOOD[:4]).sums, group_of(cache, COARSE, GOOD[4:]).sums])
    whole = group_of(cache, COARSE, GOOD).sums
    assert (parts.rows, parts.maps, parts.coded) == (whole.rows, whole.maps, whole.coded) == (9, 18, whole.coded)
    np.testing.assert_allclose(parts.products_CC, whole.products_CC, rtol=1e-9)


def test_escapes_are_counted(tiny_cache: Path) -> None:
    """The share of escapes is that of coded values beyond the half width of their table; none is at int16's limit."""
    cache = Cache(tiny_cache)
    sums = group_of(cache, FINE, GOOD).sums
    fit = cache.fit[FINE]
    classes = fit.classes.ravel()[fit.live]
    half = fit.half_width[fit.class_table[classes]].astype(int)
    values = tiny_plan().values[FINE][GOOD].astype(int)
    assert sums.escaped == (np.abs(values) > half).sum()
    assert (sums.saturated, sums.coded) == (0, values.size)


def test_intervals_cover_the_truth() -> None:
    """Of 400 samples of a known population about 95 % of the jackknife's intervals hold its ratio; a sample of half of
    it needs narrower ones, and all of it none.
    """
    rng = np.random.default_rng(0)
    population = rng.gamma(2.0, size=(4000, 2))
    truth = population[:, 0].sum() / population[:, 1].sum()

    def ratio(parts: list[np.ndarray]) -> float:
        whole = np.concatenate(parts)
        return float(whole[:, 0].sum() / whole[:, 1].sum())

    for share in (0.05, 0.5):
        hits = 0
        for _ in range(400):
            parts = np.array_split(population[rng.permutation(4000)[: int(4000 * share)]], 20)
            found = jackknife(parts, ratio, share)
            hits += found.low <= truth <= found.high
        assert 0.91 <= hits / 400 <= 0.99
    exact = jackknife([population], ratio, 1.0)
    assert exact.low == exact.value == exact.high == pytest.approx(truth)
    alone = jackknife([population], ratio, 0.5)
    assert alone.low is None and alone.high is None


def test_wilsons_interval() -> None:
    """15 of 20 gives [0.531, 0.888], as tables have it; 0 of 10 stays in [0, 1]."""
    found = proportion(15, 20)
    assert (found.low, found.high) == (pytest.approx(0.531, abs=1e-3), pytest.approx(0.888, abs=1e-3))
    assert proportion(0, 10).low == pytest.approx(0, abs=1e-12)


def noisy(cache: Cache, draws: int, noise: float, rows: int = 600) -> Group:
    """Return the sums of maps that are one signal of variance 1 and noise of a known variance a draw."""
    rng = np.random.default_rng(1)
    signal = rng.normal(size=(rows, 1, 4))
    values = signal + noise**0.5 * rng.normal(size=(rows, draws, 4))
    sums = empty(cache, FINE)
    sums.rows, sums.maps, sums.values = rows, rows * draws, values.size
    sums.whitened_C = values.sum((0, 1))
    deviation = np.square(values - values.mean(1, keepdims=True)).sum()
    sums.between_draws = np.array([deviation / (draws - 1) * draws, np.square(values).sum()])
    return Group(sums=sums)


@pytest.mark.parametrize("draws", [2, 4])
def test_noise_share_is_unbiased(tiny_cache: Path, draws: int) -> None:
    """With noise of a third of the signal's variance a quarter of all is noise, however many draws there are."""
    found = measures.noise_share([noisy(Cache(tiny_cache), draws, 1 / 3).sums])
    assert found == pytest.approx(0.25, abs=0.02)


def test_hsic_is_unbiased_and_cka_knows_rotations() -> None:
    """Unbiased HSIC of independent features is 0 on average even where channels outnumber samples, where the plain one
    is near 1; CKA is 1 for a rotation and a scale, 0 for what is independent.
    """
    rng = np.random.default_rng(2)
    batches = [(rng.normal(size=(16, 64)), rng.normal(size=(16, 64))) for _ in range(60)]
    independent = [(measures.hsic(x, y), measures.hsic(x, x), measures.hsic(y, y)) for x, y in batches]
    assert abs(measures.cka(independent)) < 0.1
    rotation = special_ortho_group.rvs(64, random_state=3)
    rotated = [
        (measures.hsic(x, 3 * x @ rotation), measures.hsic(x, x), measures.hsic(3 * x, 3 * x)) for x, _ in batches
    ]
    assert measures.cka(rotated) == pytest.approx(1, abs=1e-9)


def groups_of(features: np.ndarray, parts: int = 4) -> list[Group]:
    """Return pooled features as groups of rows."""
    rows = np.array_split(np.arange(len(features)), parts)
    return [Group(sums=None, pooled_rows=r, pooled_RC=features[r].astype(np.float32)) for r in rows]


def test_similarity_is_a_symmetric_matrix_over_common_rows() -> None:
    """Each array is like itself and like a rotation of itself; rows that one of them lacks are left out of both."""
    x = np.random.default_rng(4).normal(size=(80, 5))
    short = groups_of(x @ special_ortho_group.rvs(5, random_state=5))
    short[0] = Group(sums=None, pooled_rows=short[0].pooled_rows[2:], pooled_RC=short[0].pooled_RC[2:])
    found = similarities({"a": groups_of(x), "b": short}, 0.1)
    assert found["names"] == ["a", "b"]
    np.testing.assert_allclose(found["value"], [[1, 1], [1, 1]], atol=1e-5)
    assert found["half_width"][0][1] == pytest.approx(0, abs=1e-5)


def test_knn_finds_what_is_there() -> None:
    """Separate classes are always found, shuffled labels at chance; without labels, or of one class, nothing is."""
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 4, 400)
    features = np.eye(4)[labels] + 0.05 * rng.normal(size=(400, 4))
    found, chance = knn_accuracy(groups_of(features), pa.chunked_array([labels]))
    assert found.value == 1 and chance == np.bincount(labels).max() / 400
    shuffled, _ = knn_accuracy(groups_of(features), pa.chunked_array([rng.permutation(labels)]))
    assert shuffled.low < 0.25 < shuffled.high + 0.05
    assert knn_accuracy(groups_of(features), pa.chunked_array([pa.nulls(400, pa.int32())])) == (None, None)
    assert knn_accuracy(groups_of(features), pa.chunked_array([np.zeros(400, int)])) == (None, None)


def test_a_damaged_sample_is_left_out_and_named(tiny_copy: Path) -> None:
    """A flipped bit takes one sample out of one tap; the statistics are those of the others, and are not kept."""
    flip(tiny_copy / f"data.zarr/{FINE}/c.1.0.0")
    found = cache_statistics(tiny_copy, InspectOptions(exact=True))
    key = tiny_plan().samples[4].key
    assert list(found["left_out"]) == [f"{FINE} of {key}"]
    assert "the checksum does not match" in found["left_out"][f"{FINE} of {key}"]
    rest = GOOD[GOOD != 4]
    assert found["taps"][0]["mean"]["value"] == pytest.approx(
        float(Cache(tiny_copy).raw(FINE, rest).double().mean()), rel=1e-5
    )
    assert not kept_folder().exists()
    assert f"left out: {FINE} of {key}" in " ".join(inspect(tiny_copy, "--stats").output.split())


def test_a_lost_shard_is_left_out_and_named(tiny_copy: Path) -> None:
    """Rows of a shard file that is gone are not sampled; the file is named."""
    (tiny_copy / f"data.zarr/{COARSE}/c.0.0.0").unlink()
    found = cache_statistics(tiny_copy, InspectOptions())
    assert found["num_usable"] == 5
    assert found["left_out"] == {str(tiny_copy / f"data.zarr/{COARSE}/c.0.0.0"): "no file"}


def test_an_unfinished_cache_has_statistics_of_what_is_there(tmp_path: Path) -> None:
    """Before the first commit there is nothing to take; after it, and after the next, what is there counts."""
    plan, root = tiny_plan(), tmp_path / "cache"
    writer = begin(root, plan)
    with pytest.raises(ConfigError, match="no sample with features is there yet; statistics need one"):
        cache_statistics(root, InspectOptions())
    counts = []
    for shard in writer.missing:
        writer.write_shard(plan.shards[shard])
        before = tree(root)
        counts.append(cache_statistics(root, InspectOptions())["num_usable"])
        assert tree(root) == before
    assert counts == [4, 7, 9]


def test_statistics_are_kept_outside_of_the_cache(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is decoded; other options or a spoilt file are computed anew; the cache stays."""
    before = tree(tiny_cache)
    first = cache_statistics(tiny_cache, InspectOptions(samples=6))
    [file] = kept_folder().iterdir()
    assert file.name.startswith(Cache(tiny_cache).reader.manifest.identity[:32])
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.statistics.run.group_sums", None)
        assert cache_statistics(tiny_cache, InspectOptions(samples=6)) == first
        with pytest.raises(TypeError):
            cache_statistics(tiny_cache, InspectOptions(samples=5))
    file.write_bytes(file.read_bytes().replace(b'"num_rows":6', b'"num_rows":7'))
    assert cache_statistics(tiny_cache, InspectOptions(samples=6)) == first
    assert tree(tiny_cache) == before


def test_a_folder_that_cannot_be_written_is_no_failure(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the user's cache folder is a file, statistics are shown and not kept."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_statistics(tiny_cache, InspectOptions())["num_rows"] == 9
    assert "statistics are not kept" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts no bytes read here")
def test_a_sample_is_all_that_is_read(tmp_path: Path) -> None:
    """The kernel counts no more bytes read for a sample of two rows than opening, indices and their own chunks."""

    def bytes_read() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]

    plan = tiny_plan()
    root = write_cache(tmp_path / "cache", plan)
    cache_statistics(root, InspectOptions(samples=3))  # whatever is loaded on the way
    before = bytes_read()
    Cache(root, allow="damage")
    opening = bytes_read() - before
    before = bytes_read()
    cache_statistics(root, InspectOptions(samples=2))
    spent = bytes_read() - before
    before = bytes_read()
    cache_statistics(root, InspectOptions(exact=True))
    everything = bytes_read() - before
    payload = {name: plan.arrays[name].length for name in (FINE, COARSE)}
    index = sum(a.num_shards * (a.shard_rows * a.payloads_a_row * 16 + 4) for a in plan.arrays.values())
    # A chunk is a payload in a frame: at most its length and 64 bytes.
    assert spent - 2 * opening <= 2 * VIEWS * (sum(payload.values()) + 2 * 64) + index + 2048
    assert everything - spent >= 5 * VIEWS * sum(len(plan.payload(name, 0, 0)) for name in payload)


def test_the_json_has_statistics(tiny_cache: Path) -> None:
    """--json --stats holds all of them, as JSON without NaN; the terminal shows every tap."""
    report = json.loads(inspect(tiny_cache, "--stats", "--json").stdout, parse_constant=pytest.fail)
    assert report["statistics"]["num_rows"] == 9
    assert report["statistics"]["cka"]["names"] == [FINE, COARSE]
    assert "all 9 of 9 samples" in inspect(tiny_cache, "--exact").output
    assert "a sample of 6 of 9 samples" in inspect(tiny_cache, "--stats", "--samples", 6).output


def test_recorded_measurements_are_shown(tmp_path: Path) -> None:
    """The codec's error is that of the manifest's sums, the noise share the fit's where there is one draw."""
    plan = tiny_plan()
    root = write_cache(tmp_path / "cache", replace(plan))
    found = cache_statistics(root, InspectOptions())["taps"][0]
    sums = Cache(root).reader.manifest.sums[FINE]
    assert found["codec_error"]["value"] == sums.squared_error / sums.energy
    assert (found["noise_share"]["value"], found["noise_share_from"]) == (0.1, "fit")
