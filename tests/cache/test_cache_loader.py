"""cache.loader: batches for a training loop of one's own, re-iterable and resumable."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from store.builders import COARSE, FAILED_ROW, FINE, ROWS, tiny_plan
from torch.utils.data._utils.pin_memory import pin_memory

from dtcache.cache.batch import Batch
from dtcache.cache.cache import Cache
from dtcache.errors import ConfigError
from dtcache.whitening import whiten

GOOD = [row for row in range(ROWS) if row != FAILED_ROW]


@pytest.fixture(scope="module")
def cache(tiny_cache: Path) -> Cache:
    """The tiny cache, open."""
    return Cache(tiny_cache)


def rows_of(batches: list[Batch]) -> list[int]:
    """Return the rows of batches in order."""
    return [row for batch in batches for row in batch.rows.tolist()]


def test_a_batch_pairs_images_with_the_teachers_features(cache: Cache) -> None:
    """Keys, labels, views, images and targets of a batch belong to one another."""
    plan = tiny_plan()
    views_seen = set()
    for batch in cache.loader(batch_size=4):
        assert len(batch) == len(batch.keys) == len(batch.labels) == len(batch.views)
        for i, (row, view) in enumerate(
            zip(batch.rows.tolist(), batch.views.tolist(), strict=True)
        ):
            assert batch.keys[i] == plan.samples[row].key
            assert int(batch.labels[i]) == plan.samples[row].label
            image = plan.pixels[row][:, :, ::-1] if view else plan.pixels[row]
            np.testing.assert_array_equal(batch.images_BCHW[i].numpy(), image)
            for name, maps in batch.targets.items():
                raw = plan.raw[name][row, view]
                error = np.square(maps[i].numpy() - raw).mean()
                assert maps.dtype == torch.float32 and error < 0.05 * raw.var()
            views_seen.add(view)
    assert views_seen == {0, 1}


def test_the_argument_whitened_says_the_scale(cache: Cache) -> None:
    """With whitened=True targets are (raw - mu) / sigma per sample; `whitened` always is."""
    own = next(iter(cache.loader(batch_size=3)))
    white = next(iter(cache.loader(batch_size=3, whitened=True)))
    for name, maps in own.targets.items():
        torch.testing.assert_close(white.targets[name], own.whitened[name], rtol=0, atol=0)
        # The codec's error, and none of the scale, is left.
        error = (whiten(maps)[0] - white.targets[name]).square().mean((1, 2, 3))
        assert float(error.max()) < 0.05
        assert (maps.mean((1, 2, 3)) - white.targets[name].mean((1, 2, 3))).abs().min() > 1


def test_targets_are_the_features_of_their_keys(cache: Cache) -> None:
    """batch.targets are cache.features of batch.keys in batch.views, not of the rows' positions."""
    for batch in cache.loader(batch_size=4):
        features = cache.features(batch.keys)
        for name, maps in batch.targets.items():
            of_views = features[name][range(len(batch)), batch.views]
            torch.testing.assert_close(maps, of_views, rtol=1e-5, atol=1e-5)


def test_names_select_arrays(cache: Cache) -> None:
    """`names` selects the arrays that are read; an unknown one is refused with the cached ones."""
    batch = next(iter(cache.loader(batch_size=2, names=[COARSE])))
    assert list(batch.targets) == list(batch.coefficients) == [COARSE]
    assert next(iter(cache.loader(batch_size=2, names=[]))).targets == {}
    with pytest.raises(ConfigError, match=rf"^`names` 'x': the cache has {FINE}, {COARSE}; pass"):
        cache.loader(batch_size=2, names=["x"])
    with pytest.raises(ConfigError, match=rf"^`names` '{FINE}': expected a list"):
        cache.loader(batch_size=2, names=FINE)


def test_each_iteration_is_an_epoch(cache: Cache) -> None:
    """Iterating again reads the next epoch in full; set_epoch reads one again, bit for bit."""
    loader = cache.loader(batch_size=4, seed=3)
    assert len(loader) == 3
    first, second = list(loader), list(loader)
    assert sorted(rows_of(first)) == sorted(rows_of(second)) == GOOD
    assert rows_of(first) != rows_of(second)
    loader.set_epoch(1)
    assert rows_of(list(loader)) == rows_of(second)
    assert rows_of(list(cache.loader(batch_size=4, seed=3, epoch=1))) == rows_of(second)
    assert len(cache.loader(batch_size=4, drop_last=True)) == 2


def test_without_shuffle_rows_ascend_in_view_0(cache: Cache) -> None:
    """shuffle='none' yields the rows in order, each in view 0, in every epoch."""
    loader = cache.loader(batch_size=4, shuffle="none")
    for _ in range(2):
        batches = list(loader)
        assert rows_of(batches) == GOOD
        assert not torch.cat([batch.views for batch in batches]).any()


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_a_state_continues_at_the_next_batch(cache: Cache, taken: int) -> None:
    """A new loader with a saved state yields the batches that were still to come, then goes on."""
    loader = cache.loader(batch_size=4, seed=1, epoch=2)
    whole = rows_of(list(loader)) + rows_of(list(loader))
    loader.set_epoch(2)
    running = iter(loader)
    before = [next(running) for _ in range(taken)]
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    again = cache.loader(batch_size=4, seed=1)
    again.load_state_dict(state)
    again.set_epoch(again.epoch)  # a loop over epochs sets the restored one
    rest = rows_of(list(again))
    if taken < 3:
        rest += rows_of(list(again))
    assert rows_of(before) + rest == whole


def test_a_state_of_another_loader_is_refused(cache: Cache) -> None:
    """A state that is none, or that was saved with another order, raises with the field."""
    loader = cache.loader(batch_size=4)
    state = loader.state_dict()
    for field, value in (("batch_size", 2), ("seed", 9), ("shuffle", "block"), ("samples", "x")):
        with pytest.raises(ConfigError, match=rf"^`state`: expected `{field}` .*, got {value};"):
            loader.load_state_dict({**state, field: value})
    for other in ({}, {"epoch": 1}, None, [1]):
        with pytest.raises(ConfigError, match=r"^`state`: expected epoch, batch, batch_size"):
            loader.load_state_dict(other)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^`batch` -1: expected an integer of 0 or more"):
        loader.load_state_dict({**state, "batch": -1})
    assert loader.state_dict() == state


def test_an_iteration_ends_when_the_loader_moves_on(cache: Cache) -> None:
    """A batch after set_epoch, load_state_dict or a second iteration raises, and loses nothing."""
    loader = cache.loader(batch_size=4)
    state = loader.state_dict()
    for move in (
        lambda: loader.set_epoch(5),
        lambda: loader.load_state_dict(state),
        lambda: iter(loader),
    ):
        running = iter(loader)
        next(running)
        move()
        with pytest.raises(ConfigError, match=r"^`epoch`: this iteration ended when the loader"):
            next(running)
        assert sorted(rows_of(list(loader))) == GOOD


def test_ranks_share_every_batch(cache: Cache) -> None:
    """Each rank yields as many batches as the others, and each sample comes from one rank."""
    alone = list(cache.loader(batch_size=4, drop_last=True, seed=2))
    ranks = [
        list(cache.loader(batch_size=4, drop_last=True, seed=2, rank=rank, world_size=2))
        for rank in range(2)
    ]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert rows_of(parts) == whole.rows.tolist()
    with pytest.raises(ConfigError, match=r"last batch of at least 2 samples, one per .*, got 1"):
        iter(cache.loader(batch_size=4, rank=1, world_size=2))
    with pytest.raises(ConfigError, match=r"^`batch_size` 3: expected a multiple of the 2 proc"):
        iter(cache.loader(batch_size=3, rank=1, world_size=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 2.0}, r"^`batch_size` 2\.0: expected an integer of 1 or more"),
        ({"threads": 0}, r"^`threads` 0: expected an integer of 1 or more"),
        ({"seed": -1}, r"^`seed` -1: expected an integer of 0 or more"),
        ({"epoch": True}, r"^`epoch` True: expected an integer of 0 or more"),
        ({"shuffle": True}, r"^`shuffle` True: expected one of full, block, none; use full"),
        ({"device": "nowhere"}, r"^`device` 'nowhere': expected a device of this machine"),
        ({"rank": 0}, r"^`rank` and `world_size`: expected both or neither"),
        ({"rank": 2, "world_size": 2}, r"^`rank` 2: expected 0 to 1, below `world_size`"),
    ],
)
def test_misuse_names_the_field(cache: Cache, arguments: dict[str, object], message: str) -> None:
    """An argument that cannot work raises ConfigError with its name, before anything is read."""
    with pytest.raises(ConfigError, match=message):
        cache.loader(**{"batch_size": 2, **arguments})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^`epoch` 1\.5: expected an integer"):
        cache.loader(batch_size=2).set_epoch(1.5)  # type: ignore[arg-type]


def test_a_batch_moves_as_libraries_move_it(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """`to` and torch's pin_memory reach every tensor; copies and pickles keep keys and targets."""
    loader = cache.loader(batch_size=2, device="cpu")
    batch = next(iter(loader))
    there = batch.to("meta", non_blocking=True)
    tensors = [there.images_BCHW, there.labels, there.views, there.rows]
    tensors += [*there.coefficients.values(), *there.scalars.values()]
    assert {x.device.type for x in tensors} == {"meta"}
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    assert pin_memory(batch).keys == batch.keys and len(pinned) == len(tensors)
    for again in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert again.keys == batch.keys
        assert torch.equal(again.targets[FINE], batch.targets[FINE])
    assert repr(batch) == f"Batch of 2 samples on cpu: {FINE}, {COARSE}"
    assert repr(loader).startswith("loader of 5 batches of 2, shuffle='full', epoch 0: ")
