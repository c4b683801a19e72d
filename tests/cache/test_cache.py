"""The Python interface of an open cache agrees with the teacher within the codec's error."""

import copy
import os
import pickle
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from torch.utils.data import DataLoader

import dtcache
from dtcache.cache.cache import Cache, CachedSample
from dtcache.cache.fitted_codec import load_fit
from dtcache.cache.loader import Batching, EpochLoader
from dtcache.codec import max_array_bytes
from dtcache.errors import (
    CacheDamagedError,
    CacheError,
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
    assert len(dtcache.open(str(cache.reader.root))) == len(cache) == len(GOOD)
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
    """cache[i] is the i-th usable sample: key, label, image and, nearly, the features."""
    plan = tiny_plan()
    for index in (*range(len(GOOD)), -1):
        sample = cache[index]
        number = GOOD[index]
        assert (sample.key, sample.label) == (plan.samples[number].key, plan.samples[number].label)
        np.testing.assert_array_equal(sample.image_CHW.numpy(), plan.pixels[number])
        assert list(sample.features) == [FINE, COARSE]
        for name, maps in sample.features.items():
            assert_close(maps.numpy(), plan.raw[name][number])


def test_samples_that_are_not_there(cache: Cache) -> None:
    """An index outside the cache, a failed image and an index of another type are named."""
    for index in (len(GOOD), -len(GOOD) - 1):
        with pytest.raises(IndexError, match=rf"has {len(GOOD)} usable samples, got index {index}"):
            cache[index]
    with pytest.raises(
        UnknownSampleError,
        match=rf"image{FAILED_ROW:02}.png has no features: cannot identify image",
    ):
        cache[tiny_plan().samples[FAILED_ROW].key]
    for wrong in (0.0, True, None, [1]):
        with pytest.raises(ConfigError, match=r"^`index` .*: expected an integer, a slice or a"):
            cache[wrong]  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match=r"^`index` slice.*; pass integers"):
        cache["a":"b"]  # type: ignore[misc]


def same(one: CachedSample, other: CachedSample) -> bool:
    """Return whether two samples agree in every bit."""
    return (
        one[:2] == other[:2]
        and torch.equal(one.image_CHW, other.image_CHW)
        and all(torch.equal(maps, other.features[name]) for name, maps in one.features.items())
    )


def test_a_cache_is_a_sequence_of_usable_samples(cache: Cache) -> None:
    """Iteration, slices, keys and __getitems__ give the same samples; `in` looks at usable keys."""
    plan = tiny_plan()
    every = list(cache)
    assert [sample.key for sample in every] == [plan.samples[row].key for row in GOOD]
    for some, wanted in (
        (cache[2:8:3], every[2:8:3]),
        (cache[::-1], every[::-1]),
        (cache[4:4], []),
        (cache.__getitems__([3, -1, 3]), [every[3], every[-1], every[3]]),
        ([cache[every[6].key]], [every[6]]),
        ([cache[np.int64(1)]], [every[1]]),  # type: ignore[call-overload]
    ):
        assert len(some) == len(wanted)
        assert all(map(same, some, wanted))
    assert every[0].key in cache
    assert plan.samples[FAILED_ROW].key not in cache
    assert "x.png" not in cache and "\ud800" not in cache and 0 not in cache


def test_what_a_cache_says_of_itself(cache: Cache) -> None:
    """Classes, timesteps and the recipe are at hand; repr has three lines."""
    assert cache.classes == ("red", "green", "blue")
    assert cache.timesteps == (150,)
    assert cache.recipe["shard_rows"] == SHARD_ROWS
    cache.recipe["seed"] = 0
    assert cache.recipe["seed"] == tiny_plan().recipe.seed
    assert repr(cache).splitlines() == [
        f"dtcache.open('{cache.reader.root}')",
        "  9 of 10 samples usable, 2 views, 3 classes, 8x8 px, with images",
        f"  {FINE} (4, 4, 4), {COARSE} (6, 2, 2)",
    ]


def test_a_closed_cache_is_not_read(tiny_cache: Path) -> None:
    """After a `with` block every read raises CacheError; what was read before stays."""
    with dtcache.open(tiny_cache) as cache:
        sample = cache[0]
        running = iter(cache.loader(batch_size=1))
        next(running)
    reads: list[Callable[[], object]] = [
        lambda: cache[0],
        lambda: cache.features([sample.key]),
        lambda: cache.images([0]),
        lambda: list(running),
        lambda: next(iter(cache.loader(batch_size=1))),
    ]
    for read in reads:
        with pytest.raises(CacheError, match="the cache was closed; open it again"):
            read()
    assert len(cache) == len(GOOD) and sample.key in cache


def test_a_cache_that_is_deleted_under_a_reader(tiny_copy: Path) -> None:
    """Reads from a cache that was deleted raise CacheDamagedError, in a loader's threads too."""
    cache = dtcache.open(tiny_copy)
    shutil.rmtree(tiny_copy)
    for read in (lambda: cache[0], lambda: next(iter(cache.loader(batch_size=2)))):
        with pytest.raises(CacheDamagedError, match="No such file or directory, but the file was"):
            read()


def test_the_default_collate_reads_a_cache(cache: Cache) -> None:
    """DataLoader's default collate makes (B, V, C, H, W) features of samples; pin_memory works."""
    batches = list(DataLoader(cache, batch_size=4, shuffle=False))
    assert [len(batch.key) for batch in batches] == [4, 4, 1]
    assert batches[0].label.tolist() == [tiny_plan().samples[row].label for row in GOOD[:4]]
    for name, maps in batches[0].features.items():
        assert torch.equal(maps, cache.features(batches[0].key)[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_a_cache(cache: Cache, method: str) -> None:
    """Workers of either start method read what this process reads, after it has read too."""
    alone = [batch.features[FINE] for batch in DataLoader(cache, batch_size=3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
        workers = DataLoader(cache, batch_size=3, num_workers=2, multiprocessing_context=method)
        read = [batch.features[FINE] for batch in workers]
    assert all(map(torch.equal, alone, read)) and len(alone) == len(read)


def forked(cache: Cache) -> Any:
    """Return an iterator over a DataLoader with one forked worker, which has read a batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
        batches = iter(
            DataLoader(
                cache,  # type: ignore[arg-type]
                batch_size=1,
                num_workers=1,
                prefetch_factor=1,
                multiprocessing_context="fork",
            )
        )
        next(batches)
    return batches


def test_a_worker_that_is_killed_ends_the_epoch(tiny_cache: Path) -> None:
    """If a worker is killed, torch raises its RuntimeError with the worker and the signal.

    The cache stays open, and a new iteration reads all samples.
    """
    cache = dtcache.open(tiny_cache)
    batches = forked(cache)
    os.kill(batches._workers[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.* (killed by|exited unexpec)"):
        list(batches)
    assert len(list(DataLoader(cache, batch_size=3))) == 3  # type: ignore[arg-type]


def test_a_cache_that_is_deleted_under_a_worker(tiny_copy: Path) -> None:
    """A worker's CacheDamagedError reaches the process that iterates, with the file's name."""
    batches = forked(dtcache.open(tiny_copy))
    shutil.rmtree(tiny_copy)
    with pytest.raises(CacheDamagedError, match="No such file or directory, but the file was"):
        list(batches)


def test_a_closed_cache_in_a_dataloader(tiny_cache: Path) -> None:
    """A DataLoader over a closed cache raises the cache's own error, with and without workers."""
    with dtcache.open(tiny_cache) as cache:
        pass
    for read in (lambda: list(DataLoader(cache)), lambda: forked(cache)):  # type: ignore[arg-type]
        with pytest.raises(CacheError, match="the cache was closed; open it again"):
            read()


def test_a_sample_is_shown_in_one_line(cache: Cache) -> None:
    """The repr of a sample has its key, label and shapes, and no values."""
    assert repr(cache[0]) == (
        f"CachedSample 'class0/image00.png', label 0: {FINE} (2, 4, 4, 4), {COARSE} (2, 6, 2, 2)"
    )


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
    with pytest.raises(ConfigError, match=r"^`keys` 'x\.png': expected a list of keys; pass \["):
        cache.features("x.png")
    with pytest.raises(ConfigError, match=r"^`keys` 3: expected a str, got int"):
        cache.features([3])  # type: ignore[list-item]
    assert cache.features(key for key in ())[COARSE].shape == (0, VIEWS, 6, 2, 2)


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
    expected = opened.raw(opened.names[:1], np.array(GOOD[:2]))[opened.names[0]]
    link.unlink()
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for again in (opened, pickle.loads(pickle.dumps(opened))):
        assert again.reader.root == cache.reader.root
        assert (again.raw(again.names[:1], np.array(GOOD[:2]))[again.names[0]] == expected).all()
