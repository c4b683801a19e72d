"""The loader serves every usable row once per epoch, in an order set by (seed, epoch) alone."""

import multiprocessing
import os
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from store.builders import COARSE, FAILED_ROW, FEATURES, FINE, ROWS, begin, tiny_plan, write_cache
from support.files import flip

from dtcache.cache import loader as loader_module
from dtcache.cache import order as order_module
from dtcache.cache.batch import TrainBatch
from dtcache.cache.cache import Cache
from dtcache.cache.loader import Batching, EpochLoader
from dtcache.errors import CacheDamagedError, CacheIncompleteError, CacheNotFoundError, ConfigError
from dtcache.store.shard import index_bytes, parse_index
from dtcache.whitening import whiten

NAMES = [FINE, COARSE]


pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sealed cache that no test changes."""
    return write_cache(tmp_path_factory.mktemp("loader") / "cache", tiny_plan())


@pytest.fixture(scope="module")
def cache(root: Path) -> Cache:
    """The tiny cache, open."""
    return Cache(root)


def loader(cache: Cache, batch_size: int = 2, seed: int = 0, threads: int = 2) -> EpochLoader:
    """Return a loader of all usable rows."""
    return EpochLoader(
        cache,
        cache.reader.usable_rows,
        NAMES,
        Batching(batch_size=batch_size, seed=seed, threads=threads),
    )


def assert_same(found: TrainBatch, wanted: TrainBatch) -> None:
    """Assert that two batches agree in every bit."""
    np.testing.assert_array_equal(found.rows, wanted.rows)
    assert torch.equal(found.images_BCHW, wanted.images_BCHW)
    for name in NAMES:
        assert torch.equal(found.coefficients[name], wanted.coefficients[name])
        assert torch.equal(found.scalars[name], wanted.scalars[name])


def order_of(loader: EpochLoader, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all rows and views of an epoch, in order."""
    return loader.order(epoch).between(0, len(loader._rows))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
def test_an_epoch_serves_every_usable_row_once(cache: Cache, batch_size: int) -> None:
    """An epoch never repeats a row, skips failed rows and drops only the short last batch."""
    usable = set(range(ROWS)) - {FAILED_ROW}
    for epoch in range(3):
        batches = list(loader(cache, batch_size).epoch(epoch))
        assert len(batches) == loader(cache, batch_size).num_batches == len(usable) // batch_size
        assert all(len(b.rows) == len(b.images_BCHW) == batch_size for b in batches)
        rows = [int(row) for batch in batches for row in batch.rows]
        assert len(rows) == len(set(rows)) == len(usable) // batch_size * batch_size
        assert set(rows) <= usable


def test_dropped_rows_change_with_the_epoch(cache: Cache) -> None:
    """No usable row is dropped in every epoch."""
    served = {
        int(row)
        for epoch in range(12)
        for batch in loader(cache, 4).epoch(epoch)
        for row in batch.rows
    }
    assert served == set(range(ROWS)) - {FAILED_ROW}


def test_order_is_a_function_of_seed_and_epoch(cache: Cache) -> None:
    """Rows and views depend on seed and epoch, not on batch size, threads or earlier epochs."""
    rows, views = order_of(loader(cache, seed=1), 4)
    used = loader(cache, batch_size=3, seed=1, threads=1)
    list(used.epoch(0))
    again = order_of(used, 4)
    np.testing.assert_array_equal(again[0], rows)
    np.testing.assert_array_equal(again[1], views)
    orders = {
        (*order_of(loader(cache, seed=s), e)[0].tolist(),) for s in range(4) for e in range(5)
    }
    assert len(orders) == 20
    choices = {
        (*order_of(loader(cache, seed=s), e)[1].tolist(),) for s in range(4) for e in range(5)
    }
    assert len(choices) > 10


def test_both_views_are_served_evenly(cache: Cache) -> None:
    """Each epoch takes view 1 for half of the rows; over the epochs every row gets both views."""
    seen: dict[int, set[int]] = {}
    for epoch in range(12):
        rows, views = order_of(loader(cache), epoch)
        assert int(views.sum()) == len(rows) // 2
        for row, view in zip(rows.tolist(), views.tolist(), strict=True):
            seen.setdefault(row, set()).add(view)
    assert all(views == {0, 1} for views in seen.values())


@pytest.mark.parametrize("threads", [1, 3])
def test_start_continues_exactly(cache: Cache, threads: int) -> None:
    """An epoch started at batch k equals the rest of the full epoch, bit for bit."""
    whole = list(loader(cache).epoch(2))
    for start in range(len(whole) + 1):
        rest = list(loader(cache, threads=threads).epoch(2, start))
        assert len(rest) == len(whole) - start
        for found, wanted in zip(rest, whole[start:], strict=True):
            assert_same(found, wanted)


def test_batches_hold_what_was_cached(cache: Cache) -> None:
    """A batch holds the cached coefficients and scalars, and view 1 is the mirrored image."""
    plan = tiny_plan()
    mirrored = 0
    for epoch in range(3):
        views = order_of(loader(cache), epoch)[1].reshape(-1)
        place = 0
        for batch in loader(cache).epoch(epoch):
            for i, row in enumerate(batch.rows.tolist()):
                view = int(views[place])
                place += 1
                mirrored += view
                image = plan.pixels[row]
                np.testing.assert_array_equal(
                    batch.images_BCHW[i].numpy(), image[:, :, ::-1] if view else image
                )
                for name in NAMES:
                    np.testing.assert_array_equal(
                        batch.coefficients[name][i].numpy(), plan.values[name][row, view]
                    )
                    raw = plan.raw[name][row, view].astype(np.float64)
                    np.testing.assert_allclose(
                        batch.scalars[name][i].numpy(),
                        [np.sqrt(raw.var() + 1e-6), raw.mean()],
                        rtol=1e-5,
                    )
    assert 0 < mirrored < place * 3


def test_decoded_batches_are_the_teachers_features(cache: Cache) -> None:
    """Decoded whitened features are within the codec's error, and the scalars undo whitening."""
    plan = tiny_plan()
    rows = [0, 3, 9, 9]
    views = [0, 1, 0, 1]
    batch = cache.batch(rows, views, NAMES)
    targets = cache.decoder(NAMES)(batch.coefficients)
    for name in NAMES:
        raw = torch.from_numpy(plan.raw[name][rows, views])
        wanted = whiten(raw)[0]
        assert targets[name].shape == wanted.shape
        error = (targets[name] - wanted).square().mean((1, 2, 3))
        assert float(error.max()) < 0.05
        sigma, mu = batch.scalars[name].T[:, :, None, None, None]
        torch.testing.assert_close(
            targets[name] * sigma + mu - raw, (targets[name] - wanted) * sigma, atol=1e-4, rtol=0
        )


def test_only_asked_taps_are_read(cache: Cache) -> None:
    """A batch of one requested tap holds that tap alone."""
    batch = cache.batch([1], [1], [COARSE])
    assert list(batch.coefficients) == list(batch.scalars) == [COARSE]
    assert cache.names == NAMES


def test_a_single_view_cache_serves_view_0(tmp_path: Path) -> None:
    """A cache without flips serves every image unmirrored."""
    plan = tiny_plan()
    recipe = replace(plan.recipe, flips=False)
    arrays = {
        n: replace(a, shape=(ROWS, 1, a.length)) if n == FEATURES else a
        for n, a in plan.arrays.items()
    }
    shards = [
        replace(s, payloads={n: p[::2] if n == FEATURES else p for n, p in s.payloads.items()})
        for s in plan.shards
    ]
    single = replace(plan, recipe=recipe, arrays=arrays, shards=shards)
    batches = list(loader(Cache(write_cache(tmp_path / "cache", single)), batch_size=9).epoch(0))
    assert len(batches) == 1
    np.testing.assert_array_equal(batches[0].images_BCHW.numpy(), plan.pixels[batches[0].rows])
    np.testing.assert_array_equal(
        batches[0].coefficients[FINE].numpy(), plan.values[FINE][batches[0].rows, 0]
    )


@pytest.mark.parametrize("batch_size", [0, -1, 10])
def test_batch_size_must_fit(cache: Cache, batch_size: int) -> None:
    """A batch size below 1 or above the number of usable rows is refused with the valid range."""
    with pytest.raises(
        ConfigError,
        match=rf"`batch_size` {batch_size}: expected 1 to 9, the samples left for training",
    ):
        loader(cache, batch_size)


class Meeting:
    """Rows whose batches wait at a barrier until every thread has started to read one."""

    num_views = 1
    shard_rows = None

    def __init__(self, threads: int) -> None:
        self._barrier = threading.Barrier(threads, timeout=30)

    def will_need(self, rows: np.ndarray, names: list[str]) -> None:
        """Raise, because these rows lie in no shards."""
        raise AssertionError("nothing to tell of")

    def batch(self, rows: np.ndarray, views: np.ndarray, names: list[str]) -> list[int]:
        """Return the rows once every thread has reached the barrier."""
        self._barrier.wait()
        return rows.tolist()


@pytest.mark.parametrize("threads", [1, 4, 9])
def test_every_thread_reads(threads: int) -> None:
    """As many batches are read at once as there are threads, even beyond the default look-ahead."""
    rows = np.arange(3 * threads)
    batches = EpochLoader(
        Meeting(threads), rows, [], Batching(batch_size=1, seed=0, threads=threads)
    ).epoch(0)
    assert sorted(row for batch in batches for row in batch) == rows.tolist()


def test_leaving_an_epoch_early_leaves_no_thread(cache: Cache) -> None:
    """The read-ahead threads end when the consumer stops after one batch."""
    batches = loader(cache, batch_size=1).epoch(0)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("cache")]


def test_damage_reaches_the_consumer(tmp_path: Path) -> None:
    """A flipped byte that a thread reads raises CacheDamagedError in the consumer."""
    root = write_cache(tmp_path / "cache", tiny_plan())
    path = root / "data.zarr" / FEATURES / "c.0.0.0"
    flip(path, 3, 4)
    damaged = loader(Cache(root), batch_size=1)
    with pytest.raises(
        CacheDamagedError,
        match=rf"sample {tiny_plan().samples[0].key} of {FEATURES}, view 0: the checksum",
    ):
        for epoch in range(20):
            list(damaged.epoch(epoch))


def test_no_damaged_chunk_is_ever_served(root: Path, tmp_path: Path) -> None:
    """With a bit flipped in any chunk or index, no batch has a row of that shard."""
    plan = tiny_plan()
    damaged = Path(shutil.copytree(root, tmp_path / "cache"))
    whole = list(loader(Cache(root), batch_size=1).epoch(0))
    served = {int(batch.rows[0]) for batch in whole}
    for name, array in plan.arrays.items():
        for shard in range(array.num_shards):
            path = damaged / array.object_path(shard)
            content = path.read_bytes()
            entries = array.shard_rows * array.payloads_per_row
            index = parse_index(content[-index_bytes(entries) :], array, len(content))
            rows = list(array.rows_of(shard))
            chunks = [
                (entry, int(index[entry, 0])) for entry in range(len(rows) * array.payloads_per_row)
            ]
            for entry, place in [*chunks, (None, len(content) - 9)]:
                path.write_bytes(
                    content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]
                )
                hit = set(rows) & served
                reason = "the shard's index is damaged"
                if entry is not None:
                    row = rows[entry // array.payloads_per_row]
                    reason = f"sample {plan.samples[row].key} of {name}, view"
                got: list[TrainBatch] = []
                failure = ""
                try:
                    for batch in loader(Cache(damaged), batch_size=1).epoch(0):
                        got.append(batch)
                except CacheDamagedError as error:
                    failure = str(error)
                for found, wanted in zip(got, whole, strict=False):
                    assert_same(found, wanted)
                assert not hit & {int(batch.rows[0]) for batch in got}
                assert bool(hit) == bool(failure) == (len(got) < len(whole))
                assert not hit or reason in failure
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            FEATURES,
            rf"{FEATURES} of sample {tiny_plan().samples[2].key}: a payload does not decode.*; run "
            rf"dtcache verify",
        ),
        (
            "images",
            rf"image {tiny_plan().samples[2].key}: a stored image of \d+ bytes does not fit into "
            rf"its payload",
        ),
    ],
)
def test_payloads_that_no_encoder_wrote(tmp_path: Path, name: str, message: str) -> None:
    """An undecodable payload with a valid checksum raises CacheDamagedError with its sample."""
    plan = tiny_plan()
    wrong = list(plan.shards[0].payloads[name])
    views = 1 if name == "images" else 2
    wrong[2 * views] = b"\xff" * 60
    shards = [
        replace(plan.shards[0], payloads={**plan.shards[0].payloads, name: wrong}),
        *plan.shards[1:],
    ]
    cache = Cache(write_cache(tmp_path / "cache", replace(plan, shards=shards)))
    cache.batch([1], [0], NAMES)
    with pytest.raises(CacheDamagedError, match=message):
        cache.batch([2], [0], NAMES)


def test_a_failed_row_asked_for_raises(cache: Cache) -> None:
    """Requesting a failed row raises; its empty payloads never become a black image."""
    with pytest.raises(
        CacheDamagedError,
        match=rf"image {tiny_plan().samples[FAILED_ROW].key}: a stored image of 0 bytes",
    ):
        cache.batch([FAILED_ROW], [0], NAMES)


def test_codec_arrays_of_another_fit_are_refused(tmp_path: Path) -> None:
    """A cache does not open if its codec arrays do not match the fit that its recipe names."""
    plan = tiny_plan()
    recipe = replace(plan.recipe, codec=replace(plan.recipe.codec, fit_sha256="0" * 64))
    root = write_cache(tmp_path / "cache", replace(plan, recipe=recipe))
    with pytest.raises(
        CacheDamagedError, match="the codec's arrays are not the fitted ones; run dtcache verify"
    ):
        Cache(root)


def test_no_cache_and_no_complete_cache(tmp_path: Path) -> None:
    """Opening for training distinguishes a folder without a cache from an incomplete cache."""
    with pytest.raises(CacheNotFoundError, match="is not a cache"):
        Cache(tmp_path)
    begin(tmp_path / "cache", tiny_plan())
    with pytest.raises(CacheIncompleteError, match="the cache is not complete"):
        Cache(tmp_path / "cache")


def served_by(
    cache: Cache, world_size: int, batch_size: int = 4, epoch: int = 1, start: int = 0, **how: str
) -> list:
    """Return the rows of each global batch, with the ranks concatenated in order."""
    ranks = [
        EpochLoader(
            cache,
            cache.reader.usable_rows,
            [COARSE],
            Batching(
                batch_size=batch_size,
                seed=5,
                threads=1,
                drop_last=False,
                rank=rank,
                world_size=world_size,
                **how,
            ),
        ).epoch(epoch, start)
        for rank in range(world_size)
    ]
    return [
        np.concatenate([batch.rows for batch in parts]).tolist()
        for parts in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("shuffle", ["full", "block"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_serves_each_row_once(
    cache: Cache, world_size: int, shuffle: str
) -> None:
    """For any world size, the ranks together serve every usable row exactly once."""
    batches = served_by(cache, world_size, shuffle=shuffle)
    assert batches == served_by(cache, 1, shuffle=shuffle)
    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert sorted(row for batch in batches for row in batch) == cache.reader.usable_rows.tolist()


def test_a_run_resumes_under_another_world_size(cache: Cache) -> None:
    """After a resume under a different world size, the remaining global batches are the same."""
    whole = served_by(cache, 1)
    for done in range(len(whole) + 1):
        for world_size in (1, 2, 4):
            assert served_by(cache, world_size, start=done) == whole[done:]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 3), (2, 2), (-1, 2), (0, 0)])
def test_ranks_must_share_a_batch_evenly(cache: Cache, rank: int, world_size: int) -> None:
    """A world size that does not divide the batch size, or a rank outside it, is refused."""
    with pytest.raises(
        ConfigError, match=rf"`batch_size` 4: expected a multiple of the {world_size} processes"
    ):
        EpochLoader(
            cache,
            cache.reader.usable_rows,
            NAMES,
            Batching(batch_size=4, seed=0, threads=1, rank=rank, world_size=world_size),
        )


def test_an_unknown_shuffle_is_refused(cache: Cache) -> None:
    """An unknown shuffle raises ConfigError with the valid names."""
    with pytest.raises(ConfigError, match="`shuffle` blocks: expected one of full, block"):
        EpochLoader(
            cache,
            cache.reader.usable_rows,
            NAMES,
            Batching(batch_size=2, seed=0, threads=1, shuffle="blocks"),
        )


def test_only_shards_are_mixed() -> None:
    """A block shuffle is refused if the rows do not lie in shards."""
    with pytest.raises(
        ConfigError, match="`shuffle='block'`: expected a cache, whose blocks of rows it mixes"
    ):
        EpochLoader(
            Meeting(1), np.arange(4), [], Batching(batch_size=2, seed=0, threads=1, shuffle="block")
        )


def test_a_block_shuffle_keeps_mixes_together(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block shuffle serves each mix of blocks together, in a different order each epoch."""
    monkeypatch.setattr(order_module, "BLOCK_ROWS", 2)
    monkeypatch.setattr(order_module, "MIXED_BLOCKS", 2)
    blocks_of = EpochLoader(
        cache,
        cache.reader.usable_rows,
        NAMES,
        Batching(batch_size=1, seed=0, threads=1, shuffle="block"),
    )
    orders = set()
    for epoch in range(20):
        rows = order_of(blocks_of, epoch)[0]
        assert sorted(rows.tolist()) == cache.reader.usable_rows.tolist()
        ends = blocks_of._block_order(epoch).ends
        mixes = np.searchsorted(ends, np.arange(len(rows)), side="right")
        blocks = [{int(row) // 2 for row in rows[mixes == mix]} for mix in range(3)]
        assert sorted(block for some in blocks for block in some) == list(range(5))
        assert [len(some) for some in blocks] == [2, 2, 1]
        orders.add((*rows.tolist(),))
    assert len(orders) == 20


def test_a_block_shuffle_tells_the_disk_a_mix_ahead(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is announced to the disk once and before its read, after a resume too."""
    monkeypatch.setattr(order_module, "BLOCK_ROWS", 1)
    monkeypatch.setattr(order_module, "MIXED_BLOCKS", 2)
    told: list[int] = []
    opened = Cache(cache.reader.root)
    monkeypatch.setattr(opened, "will_need", lambda rows, names: told.extend(rows.tolist()))
    for start in (0, 5):
        told.clear()
        blocks = EpochLoader(
            opened,
            opened.reader.usable_rows,
            NAMES,
            Batching(batch_size=1, seed=0, threads=1, shuffle="block"),
        )
        for place, batch in enumerate(blocks.epoch(0, start)):
            assert int(batch.rows[0]) in told
            assert start or len(told) <= place + loader_module.LOOKAHEAD + 4
        assert len(told) == len(set(told)) and len(told) >= 9 - start


def test_the_disk_is_told_of_whole_stretches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring chunks are announced as one stretch that covers every requested row."""
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: calls.append(call[:3]))
    reader = Cache(root).reader
    reader.will_need(FEATURES, np.array([0, 1, 2, 8]))
    array = reader.manifest.arrays[FEATURES]
    assert [length for _, _, length in calls] == [
        int(reader._read_index(array, 0)[:6, 1].sum()),
        int(reader._read_index(array, 2)[:2, 1].sum()),
    ]


def test_an_open_cache_travels_to_a_spawned_process(cache: Cache) -> None:
    """A pickled loader reopens its cache by path and serves the same batches."""
    travelled = pickle.loads(pickle.dumps(loader(cache)))
    for found, wanted in zip(travelled.epoch(3), loader(cache).epoch(3), strict=True):
        assert_same(found, wanted)


def first_batch(batches: EpochLoader) -> TrainBatch:
    """Return a loader's first batch, in the process that calls this function."""
    return next(batches.epoch(0))


@pytest.mark.slow
def test_a_spawned_worker_reads(cache: Cache) -> None:
    """A worker started with the spawn method serves the same batch as this process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(first_batch, (loader(cache),))
    assert_same(found, first_batch(loader(cache)))
