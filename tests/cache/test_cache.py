"""The Python interface of an open cache agrees with the teacher within the codec's error."""

import copy
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
from store.builders import (
    COARSE,
    FAILED_ROW,
    FINE,
    ROWS,
    SHARD_ROWS,
    VIEWS,
    begin,
    tiny_plan,
    write_cache,
)

import dtcache
from dtcache.cache.cache import Cache
from dtcache.cache.fitted_codec import load_fit
from dtcache.cache.loader import Batching, EpochLoader
from dtcache.codec import max_array_bytes
from dtcache.errors import (
    CacheDamagedError,
    CacheMismatchError,
    CacheNotFoundError,
    ConfigError,
    UnknownSampleError,
)
from dtcache.store.manifest import read_manifest, write_manifest

GOOD = [row for row in range(ROWS) if row != FAILED_ROW]


pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The tiny cache, open."""
    return dtcache.open(write_cache(tmp_path_factory.mktemp("cache") / "cache", tiny_plan()))


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Assert that the decoded features' error is a small part of each map's variance."""
    assert found.shape == wanted.shape and found.dtype == np.float32
    axes = (-3, -2, -1)
    assert (np.square(found - wanted).mean(axes) < 0.05 * wanted.var(axes)).all()


def test_open_takes_a_path_in_any_form(cache: Cache) -> None:
    """dtcache.open takes a string or a Path and names a path that is not a cache."""
    assert len(dtcache.open(str(cache.reader.root))) == len(cache) == ROWS
    with pytest.raises(CacheNotFoundError, match="nowhere is not a cache"):
        dtcache.open("nowhere")


def test_a_fit_of_other_taps_is_refused(cache: Cache) -> None:
    """Codec arrays whose shapes differ from the recipe's taps are refused."""
    manifest = copy.deepcopy(cache.reader.manifest)
    taps = manifest.recipe["teacher"]["taps"]
    taps[0]["height"], taps[0]["width"] = taps[0]["width"] * 2, taps[0]["height"] // 2
    with pytest.raises(
        CacheDamagedError, match="the codec's arrays are not of the taps that the recipe names; run"
    ):
        load_fit(cache.reader.root, manifest)


def test_the_largest_array_of_a_fit_is_read() -> None:
    """The largest tables that a fit can need are within the size bound of the smallest tap."""
    tables = np.zeros((255, 512), np.uint16)
    assert tables.nbytes == max_array_bytes((1, 1, 1))
    assert max_array_bytes((900, 3, 2)) == np.zeros((900, 900), np.float16).nbytes
    assert max_array_bytes((3, 600, 700)) == np.zeros((3, 600, 700), np.uint8).nbytes


def test_a_sample_is_what_was_cached(cache: Cache) -> None:
    """cache[i] has row i's key, label, image and, within the codec's error, its features."""
    plan = tiny_plan()
    for row in (*GOOD, -1):
        sample = cache[row]
        number = row % ROWS
        assert (sample.key, sample.label) == (plan.samples[number].key, plan.samples[number].label)
        np.testing.assert_array_equal(sample.image_CHW.numpy(), plan.pixels[number])
        assert list(sample.features) == [FINE, COARSE]
        for name, maps in sample.features.items():
            assert_close(maps.numpy(), plan.raw[name][number])


def test_rows_that_are_not_there(cache: Cache) -> None:
    """A row outside the cache raises IndexError; a failed row raises with its key and reason."""
    for row in (ROWS, -ROWS - 1):
        with pytest.raises(IndexError, match=rf"has {ROWS} rows, got {row}"):
            cache[row]
    with pytest.raises(
        UnknownSampleError,
        match=rf"image{FAILED_ROW:02}.png has no features: cannot identify image",
    ):
        cache[FAILED_ROW]


def test_features_by_key(cache: Cache) -> None:
    """cache.features returns all views per key, in the requested order, repeated keys included."""
    plan = tiny_plan()
    rows = [7, 0, 7]
    found = cache.features([plan.samples[row].key for row in rows])
    for name in (FINE, COARSE):
        assert_close(found[name].numpy(), plan.raw[name][rows])
        assert torch.equal(found[name][0], found[name][2])


def test_keys_that_are_not_there(cache: Cache) -> None:
    """An unknown key and a failed image's key raise UnknownSampleError with the reason."""
    with pytest.raises(
        UnknownSampleError,
        match=r"no sample has the key 'x\.png'; cache\.samples\['key'\] lists them",
    ):
        cache.features([tiny_plan().samples[0].key, "x.png"])
    with pytest.raises(UnknownSampleError, match=r"has no features: cannot identify image file"):
        cache.features([tiny_plan().samples[FAILED_ROW].key])


def test_samples_is_the_index(cache: Cache) -> None:
    """cache.samples is an Arrow table with one row per sample."""
    assert cache.samples.column_names == ["row", "key", "label", "content_sha256", "failure"]
    assert cache.samples["key"].to_pylist() == [sample.key for sample in tiny_plan().samples]


def test_loader_serves_every_usable_sample(cache: Cache) -> None:
    """cache.loader yields each usable row once per epoch, in a different order each epoch."""
    orders = []
    for epoch in range(2):
        batches = list(cache.loader(batch_size=4, epoch=epoch))
        assert [len(batch.rows) for batch in batches] == [4, 4, 1]
        orders.append([int(row) for batch in batches for row in batch.rows])
        assert sorted(orders[-1]) == GOOD
    assert orders[0] != orders[1]


def test_a_batch_may_be_larger_than_the_cache(cache: Cache) -> None:
    """A batch larger than the cache holds every usable sample; a batch size below 1 is refused."""
    (batch,) = cache.loader(batch_size=100)
    assert sorted(batch.rows.tolist()) == GOOD
    for size in (0, -1):
        with pytest.raises(
            ConfigError, match=rf"^`batch_size` {size}: expected an integer of 1 or more"
        ):
            cache.loader(batch_size=size)
    with pytest.raises(ConfigError, match=r"^`batch_size` 2: expected 1 or more, .* got 0"):
        EpochLoader(
            cache, np.arange(0), [], Batching(batch_size=2, seed=0, threads=1, drop_last=False)
        )


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_a_stack_is_lazy_and_whole(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    """cache.stack is a lazy (N, V, C, H, W) array whose failed images are NaN."""
    monkeypatch.setattr("dtcache.cache.dask_array.CHUNK_VALUES", 3 * VIEWS * 64)
    stacked = cache.stack("stride2")
    assert (stacked.shape, stacked.dtype) == ((ROWS, VIEWS, 4, 4, 4), np.float32)
    assert stacked.chunks[0] == (3, 3, 3, 1)
    with dask.config.set(scheduler=scheduler):
        whole = stacked.compute()
        np.testing.assert_array_equal(stacked[6:8, 1].compute(), whole[6:8, 1])
        mean = stacked[np.array(GOOD)].mean((0, 1, 3, 4)).compute()
    assert np.isnan(whole[FAILED_ROW]).all()
    assert_close(whole[GOOD], tiny_plan().raw[FINE][GOOD])
    np.testing.assert_allclose(mean, whole[GOOD].mean((0, 1, 3, 4)), rtol=1e-4)


def test_a_chunk_of_failed_images_alone_is_nan(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk without a usable row is NaN, and its neighbouring chunks are decoded."""
    monkeypatch.setattr("dtcache.cache.dask_array.CHUNK_VALUES", 1)
    stacked = cache.stack("stride4")
    assert stacked.chunks[0] == (1,) * ROWS
    with dask.config.set(scheduler="synchronous"):
        found = stacked.compute()
    assert np.isnan(found[FAILED_ROW]).all() and np.isfinite(found[GOOD]).all()


def test_a_stack_travels(cache: Cache) -> None:
    """A pickled stack holds the cache's path, not its bytes, and computes the same values."""
    stacked = cache.stack("stride4", timestep=150)
    message = pickle.dumps(stacked)
    assert len(message) < 20_000
    with dask.config.set(scheduler="synchronous"):
        np.testing.assert_array_equal(pickle.loads(message)[:2].compute(), stacked[:2].compute())


def test_a_stack_refuses_another_cache_in_its_place(cache: Cache, tmp_path: Path) -> None:
    """A stack refuses to decode a different cache that was put at its path."""
    root = Path(shutil.copytree(cache.reader.root, tmp_path / "cache"))
    stacked = dtcache.open(root).stack("stride4")
    manifest = read_manifest(root)
    write_manifest(root, replace(manifest, classes=("others",)))
    with dask.config.set(scheduler="synchronous"):
        with pytest.raises(
            CacheMismatchError,
            match="expected the cache that the stack was made from, got a different cache",
        ):
            stacked[:1].compute()
        write_manifest(root, manifest)
        np.testing.assert_array_equal(stacked[:1].compute(), cache.stack("stride4")[:1].compute())


def test_a_stack_allows_what_its_cache_did(cache: Cache, tmp_path: Path) -> None:
    """In a stack of an incomplete cache, rows that are not extracted yet are NaN."""
    plan = tiny_plan()
    begin(tmp_path / "cache", plan).write_shard(plan.shards[0])
    stacked = Cache(tmp_path / "cache", allow="incomplete").stack("stride4")
    with dask.config.set(scheduler="synchronous"):
        found = stacked.compute()
        np.testing.assert_array_equal(
            found[:SHARD_ROWS], cache.stack("stride4")[:SHARD_ROWS].compute()
        )
    assert np.isnan(found[SHARD_ROWS:]).all()


@pytest.mark.parametrize(("tap", "timestep"), [("stride3", None), ("stride2", 50)])
def test_a_stack_of_another_tap_is_refused(cache: Cache, tap: str, timestep: int | None) -> None:
    """A tap or timestep that was not cached raises ConfigError with the cached ones."""
    with pytest.raises(
        ConfigError, match=rf"has no t{timestep or 150}/{tap}, only {FINE}, {COARSE}; pass one"
    ):
        cache.stack(tap, timestep=timestep)


def test_paths_are_resolved_at_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Cache
) -> None:
    """After a chdir and a moved link, an open cache and its pickle read the same files."""
    link = tmp_path / "link"
    link.symlink_to(cache.reader.root)
    monkeypatch.chdir(tmp_path)
    opened = Cache(Path("link"))
    expected = opened.raw(opened.names[0], np.array(GOOD[:2]))
    link.unlink()
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for again in (opened, pickle.loads(pickle.dumps(opened))):
        assert again.reader.root == cache.reader.root
        assert (again.raw(again.names[0], np.array(GOOD[:2])) == expected).all()
