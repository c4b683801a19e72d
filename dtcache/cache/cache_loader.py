"""`cache.loader(...)`: batches of a cache for the user's own training loop."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from dtcache.arguments import list_of, require, require_count
from dtcache.cache.batch import NO_LABEL, Batch, BatchContext, Rows, TrainBatch, device_here
from dtcache.cache.device_copies import Pinned, copied_ahead
from dtcache.cache.loader import SHUFFLES, Batching, EpochLoader, Readable
from dtcache.codec import TapCodec
from dtcache.errors import ConfigError
from dtcache.hashing import sha256_json
from dtcache.store.reader import CacheReader


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderSpec:
    """The arguments of `cache.loader`. Its docstring explains them."""

    batch_size: int
    names: Sequence[str] | None = None
    whitened: bool = False
    shuffle: str = "full"
    seed: int = 0
    epoch: int = 0
    drop_last: bool = False
    threads: int = 2
    device: torch.device | str | None = None
    pin_memory: bool = False
    rank: int | None = None
    world_size: int | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError with the field's name for a value that cannot work."""
        counts = (("batch_size", 1), ("threads", 1), ("seed", 0), ("epoch", 0))
        for name, least in counts:
            require_count(name, getattr(self, name), least)
        for name in ("whitened", "drop_last", "pin_memory"):
            require(name, getattr(self, name), bool, "True or False")
        if self.shuffle not in SHUFFLES:
            raise ConfigError(
                f"`shuffle` {self.shuffle!r}: expected one of {', '.join(SHUFFLES)}; use full"
            )
        if (self.rank is None) != (self.world_size is None):
            raise ConfigError(
                "`rank` and `world_size`: expected both or neither; pass neither to take them from "
                "torch.distributed"
            )
        if self.rank is not None and self.world_size is not None:
            require_count("world_size", self.world_size, 1)
            require_count("rank", self.rank, 0)
            if self.rank >= self.world_size:
                raise ConfigError(
                    f"`rank` {self.rank}: expected 0 to {self.world_size - 1}, below `world_size`; "
                    "pass the rank of this process"
                )


class Served(Readable[TrainBatch], Protocol):
    """An open cache, as a loader reads it."""

    reader: CacheReader
    names: list[str]

    @property
    def fit(self) -> Mapping[str, TapCodec]:
        """The fitted codec by array."""

    def require_images(self) -> None:
        """Raise ConfigError if the cache stores no images and no source of them was given."""


class CacheLoader:
    """The batches of a cache, epoch after epoch. Every sample comes once per epoch.

    Each iteration reads one epoch, in an order that depends on (`seed`, epoch) alone; the next
    iteration reads the next epoch. `set_epoch` chooses the epoch. `state_dict` and
    `load_state_dict` resume in the middle of an epoch. If torch.distributed is initialised when an
    iteration begins, each process reads its slice of every batch.
    """

    def __init__(self, cache: Served, spec: LoaderSpec) -> None:
        """Serve the usable samples of a cache.

        Raises ConfigError with the field's name if an argument cannot work with this cache.
        """
        self._cache = cache
        self._spec = spec
        self._names = _names(cache, spec.names)
        self._device = None if spec.device is None else device_here(spec.device)
        cache.require_images()
        self._epoch = spec.epoch
        self._done = 0
        self._begun = False
        self._iteration = 0
        self._batches(rank=0, world_size=1)

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return self._batches(*self._place()).num_batches

    def __repr__(self) -> str:
        """Return one line: batches, samples, order and arrays."""
        return (
            f"loader of {len(self)} batches of {self._spec.batch_size}, "
            f"shuffle={self._spec.shuffle!r}, epoch {self._epoch}: {', '.join(self._names)}"
        )

    def __iter__(self) -> Iterator[Batch]:
        """Read an epoch: the one that was set or restored, otherwise the next one.

        It ends any other iteration of this loader. Raises ConfigError if the processes cannot
        share `batch_size`.
        """
        batches = self._batches(*self._place())
        if self._begun:
            self._epoch += 1
            self._done = 0
        self._begun = True
        self._iteration += 1
        return self._read(batches, self._iteration)

    @property
    def epoch(self) -> int:
        """The epoch that is being read, or that the next iteration reads."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration read an epoch from its beginning.

        After `load_state_dict`, setting the restored epoch keeps its position. A running iteration
        ends with an error. Raises ConfigError if `epoch` is not an integer of 0 or more.
        """
        require_count("epoch", epoch, 0)
        if self._begun or epoch != self._epoch:
            self._done = 0
        self._epoch = epoch
        self._begun = False
        self._iteration += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was yielded, to be saved with the weights.

        It is plain data, the same in every process, and fits any number of processes.
        """
        return {"epoch": self._epoch, "batch": self._done, **self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration continue after the batch at which `state` was saved.

        Raises ConfigError if the state is not one of `state_dict`, or if it was saved with other
        samples, another `batch_size`, `seed`, `shuffle` or `drop_last`.
        """
        own = self.state_dict()
        if not isinstance(state, Mapping) or set(state) != set(own):
            raise ConfigError(
                f"`state`: expected {', '.join(own)}, got "
                f"{', '.join(map(str, state)) if isinstance(state, Mapping) else type(state)}; "
                "pass a state that `state_dict` returned"
            )
        for name, value in self._order().items():
            if state[name] != value:
                raise ConfigError(
                    f"`state`: expected `{name}` {value}, as this loader has, got {state[name]}; "
                    "make the loader with the arguments and the cache of the saved one"
                )
        require_count("epoch", state["epoch"], 0)
        require_count("batch", state["batch"], 0)
        self._epoch = state["epoch"]
        self._done = state["batch"]
        self._begun = False
        self._iteration += 1

    def _order(self) -> dict[str, Any]:
        """Return the fields on which the order of the batches depends."""
        return {
            "batch_size": self._spec.batch_size,
            "seed": self._spec.seed,
            "shuffle": self._spec.shuffle,
            "drop_last": self._spec.drop_last,
            "samples": sha256_json(self._cache.reader.data_identity),
        }

    def _place(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes, as they are now."""
        if self._spec.rank is not None and self._spec.world_size is not None:
            return self._spec.rank, self._spec.world_size
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1

    def _batches(self, rank: int, world_size: int) -> EpochLoader[Batch]:
        """Return the batches of this process. Raises ConfigError."""
        spec = self._spec
        rows = self._cache.reader.usable
        source: Readable[Batch] = _Source(self._cache, self._names, spec.whitened)
        on_cuda = self._device is not None and self._device.type == "cuda"
        batching = Batching(
            batch_size=spec.batch_size,
            seed=spec.seed,
            threads=spec.threads,
            shuffle=spec.shuffle,
            drop_last=spec.drop_last,
            rank=rank,
            world_size=world_size,
        )
        short = 0 if spec.drop_last else len(rows) % spec.batch_size
        if 0 < short < world_size:
            raise ConfigError(
                f"`batch_size` {spec.batch_size}: expected a last batch of at least {world_size} "
                f"samples, one per process, got {short}; pass `drop_last=True` or another "
                "`batch_size`"
            )
        return EpochLoader(
            Pinned(source) if spec.pin_memory or on_cuda else source, rows, self._names, batching
        )

    def _read(self, batches: EpochLoader[Batch], iteration: int) -> Iterator[Batch]:
        """Yield the rest of the current epoch, and count what was yielded."""
        with closing(batches.epoch(self._epoch, self._done)) as read:
            moved = self._moved(read)
            while True:
                if iteration != self._iteration:
                    raise ConfigError(
                        "`epoch`: this iteration ended when the loader was set to an epoch or a "
                        "state, or iterated again; begin a new iteration"
                    )
                batch = next(moved, None)
                if batch is None:
                    break
                self._done += 1
                if self._done == batches.num_batches:
                    self._epoch += 1
                    self._done = 0
                    self._begun = False
                    yield batch
                    return
                yield batch

    def _moved(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Return an iterator over the batches on the device, if one was given."""
        device = self._device
        if device is None:
            return batches
        if device.type == "cuda":
            return copied_ahead(batches, device)
        return (batch.to(device) for batch in batches)


class _Source:
    """A cache whose batches are `Batch`."""

    def __init__(self, cache: Served, names: Sequence[str], whitened: bool) -> None:
        self._cache = cache
        self._context = BatchContext(
            cache.reader.samples, {name: cache.fit[name] for name in names}, whitened
        )
        self.num_views = cache.num_views
        self.shard_rows = cache.shard_rows
        self.will_need = cache.will_need

    def _labels(self, rows: Rows) -> NDArray[np.int64]:
        """Return the labels of rows; NO_LABEL for an image without a class."""
        return self._cache.reader.samples.labels(rows, NO_LABEL)

    def batch(self, rows: Rows, views: Rows, names: Sequence[str]) -> Batch:
        encoded = self._cache.batch(rows, views, names)
        return Batch(
            images_BCHW=encoded.images_BCHW,
            coefficients=encoded.coefficients,
            scalars=encoded.scalars,
            labels=torch.from_numpy(self._labels(rows)),
            views=torch.from_numpy(np.array(views, np.int64)),
            rows=torch.from_numpy(np.array(rows, np.int64)),
            context=self._context,
        )


def _names(cache: Served, names: Sequence[str] | None) -> list[str]:
    """Return the arrays to serve. Raises ConfigError for one that the cache does not have."""
    if names is None:
        return list(cache.names)
    names = list_of("names", names, str, "arrays")
    for name in names:
        if name not in cache.names:
            raise ConfigError(
                f"`names` {name!r}: the cache has {', '.join(cache.names)}; pass some of them"
            )
    return list(dict.fromkeys(names))
