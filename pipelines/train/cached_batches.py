"""Batches of a student from a cache; pipelines/train/online_batches.py has those of a teacher in the loop."""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dtcache.cache.batch import Rows, TrainBatch
from dtcache.cache.cache import Cache
from dtcache.cache.label_set import LabelledCache, LabelSet
from dtcache.cache.loader import Batching, EpochLoader
from dtcache.cache.selection import cache_identity, chosen_taps, split_rows
from dtcache.codec import TapCodec
from dtcache.device import Compute
from dtcache.distributed import Processes
from dtcache.errors import ConfigError
from dtcache.options import TrainOptions
from dtcache.recipe import Json, ViewSpec
from dtcache.store.layout import IMAGES
from dtcache.store.reader import Allowed


class BatchSource(Protocol):
    """What a student is trained on."""

    names: list[str]
    """The arrays that are regressed, timestep by timestep, finest tap first."""
    view: ViewSpec
    decoder: nn.Module
    """Turns a batch's coefficients into whitened targets."""
    fit: Mapping[str, TapCodec]
    """A cache's codec by array; empty where there is none."""
    recipe: Json
    """What a cache recorded of its making; empty for a teacher in the loop, of which nothing is measured."""
    noise_floor: dict[str, float]
    """By array, where it is known: the part of the targets' variance that is noise."""
    labels: LabelSet | None
    """The soft labels that are distilled beside the features, if any."""
    identity: Json
    """What of the data a run belongs to, beside its options."""

    @property
    def num_batches(self) -> int:
        """Global batches of an epoch."""

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of an array's maps."""

    def epoch(self, epoch: int, start: int) -> Iterator[Any]:
        """Yield this process's batches of an epoch, `--accumulate` of them a global batch, from batch `start` on."""

    def held_out(self) -> Iterator[Any]:
        """Yield the held-out samples' batches: always the same views and noise."""

    def ready(self, batch: Any) -> TrainBatch:
        """Return a batch of this source on the device, as the student and the decoder take it."""

    def keys(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return the names of samples."""


class CachedSource:
    """Batches of a cache."""

    def __init__(
        self, root: Path, options: TrainOptions, compute: Compute, processes: Processes
    ) -> None:
        """Open a cache. Raises what opening it raises, and ConfigError for options that it cannot serve."""
        allow: Allowed = "incomplete" if options.allow_incomplete else "nothing"
        self.labels: LabelSet | None = None
        if options.labels is not None:
            self._cache: Cache = LabelledCache(root, options.labels, options.images, allow=allow)
            self.labels = self._cache.labels
        else:
            self._cache = Cache(root, options.images, allow=allow)
        manifest = self._cache.reader.manifest
        if options.whitening == "position" and manifest.recipe["codec"]["name"] != "float16":
            raise ConfigError(
                "--whitening position: expected a cache of --quality fp16, whose features are exact"
            )
        if IMAGES not in manifest.arrays and options.images is None:
            raise ConfigError(
                f"{root} stores no images: give those that it was extracted from (--images)"
            )
        self.names = feature_names(self._cache, options)
        self.view = self._cache.view
        self.identity = cache_identity(self._cache)
        if self.labels is not None:
            self.identity["label_set"] = self.labels.identity
        usable = self._cache.reader.usable_rows
        if manifest.state != "sealed" and processes.is_first:
            print(
                f"{root} is not complete: {len(usable)} of {len(self._cache)} samples are there",
                file=sys.stderr,
            )
        chosen = usable[: options.limit]
        rows, self._held = split_rows(chosen, self.keys(chosen))
        self._loader = EpochLoader(
            _Pinned(self._cache) if compute.device.type == "cuda" else self._cache,
            rows,
            self.names,
            Batching(
                batch_size=options.batch_size,
                seed=options.seed,
                threads=options.threads,
                shuffle=options.shuffle,
                rank=processes.rank,
                world_size=processes.world_size,
                micro_batches=options.accumulate,
            ),
        )
        self._device = compute.device
        self._batch_size = options.batch_size
        self.decoder: nn.Module = self._cache.decoder(self.names).to(compute.device)
        self.fit: Mapping[str, TapCodec] = self._cache.fit
        self.recipe: Json = manifest.recipe
        self.noise_floor = {
            name: manifest.recipe["codec"]["noise_floor"][name] for name in self.names
        }

    @property
    def num_batches(self) -> int:
        """Global batches of an epoch."""
        return self._loader.num_batches

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of an array's maps."""
        return self._cache.shape(name)

    def epoch(self, epoch: int, start: int) -> Iterator[TrainBatch]:
        """Yield this process's batches, on a GPU copied there while it computes."""
        return copied_ahead(self._loader.epoch(epoch, start), self._device)

    def held_out(self) -> Iterator[TrainBatch]:
        """Yield the held-out samples' first views: draw 0, not mirrored."""
        for start in range(0, len(self._held), self._batch_size):
            rows = self._held[start : start + self._batch_size]
            yield self._cache.batch(rows, [0] * len(rows), self.names)

    def ready(self, batch: TrainBatch) -> TrainBatch:
        """Return a batch on the device."""
        return batch.changed(lambda x: x.to(self._device))

    def keys(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return the names of samples."""
        found: list[str] = (
            self._cache.reader.samples["key"].take(np.asarray(rows, np.int64)).to_pylist()
        )
        return found


class _Pinned:
    """A cache whose reading threads put batches where a GPU fetches them beside its work."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.num_views = cache.num_views
        self.shard_rows = cache.shard_rows
        self.will_need = cache.will_need

    def batch(self, rows: Rows, views: Rows, names: Sequence[str]) -> TrainBatch:
        return self._cache.batch(rows, views, names).changed(Tensor.pin_memory)


def copied_ahead(batches: Iterable[TrainBatch], device: torch.device) -> Iterator[TrainBatch]:
    """Yield batches on the device: on CUDA one ahead, over a side stream, while the student computes."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    waiting: deque[tuple[TrainBatch, torch.cuda.Event]] = deque()

    def arrived() -> TrainBatch:
        batch, copied = waiting.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)

        def used_here(x: Tensor) -> Tensor:
            # Else its memory could be given to the next copy while this stream still reads it.
            x.record_stream(current)
            return x

        return batch.changed(used_here)

    for batch in batches:
        with torch.cuda.stream(stream):
            there = batch.changed(lambda x: x.to(device, non_blocking=True))
            copied = torch.cuda.Event()
            copied.record(stream)
        waiting.append((there, copied))
        if len(waiting) > 1:
            yield arrived()
    while waiting:
        yield arrived()


def feature_names(cache: Cache, options: TrainOptions) -> list[str]:
    """Return the arrays that a student regresses: none of them where features weigh nothing beside labels."""
    chosen = chosen_taps(cache, timestep=options.timestep, taps=options.taps)
    return [] if options.feature_weight == 0 else chosen
