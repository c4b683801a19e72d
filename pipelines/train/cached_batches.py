"""Training batches from a cache."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from dtcache.cache.batch import Rows, TrainBatch
from dtcache.cache.cache import Cache
from dtcache.cache.device_copies import Pinned, copied_ahead
from dtcache.cache.label_set import LabelledCache, LabelSet
from dtcache.cache.loader import EpochLoader
from dtcache.cache.selection import chosen_taps, split_rows
from dtcache.codec import TapCodec
from dtcache.device import Compute
from dtcache.distributed import Processes
from dtcache.errors import ConfigError
from dtcache.options import TrainOptions
from dtcache.recipe import Json
from dtcache.store.layout import IMAGES
from dtcache.store.reader import Allowed
from dtcache.store.remote import Location
from pipelines.terminal.output import say
from pipelines.train.batch_source import batching


class CachedSource:
    """A BatchSource over a cache."""

    def __init__(
        self, location: Location, options: TrainOptions, compute: Compute, processes: Processes
    ) -> None:
        """Open a cache.

        Raises the errors of opening a cache, and ConfigError if the cache cannot serve the options.
        """
        allow: Allowed = "incomplete" if options.allow_incomplete else "nothing"
        self.labels: LabelSet | None = None
        if options.labels is not None:
            self._cache: Cache = LabelledCache(
                location, options.labels, options.images, allow=allow, reading=options.reading
            )
            self.labels = self._cache.labels
        else:
            self._cache = Cache(location, options.images, allow=allow, reading=options.reading)
        manifest = self._cache.reader.manifest
        if IMAGES not in manifest.arrays and options.images is None:
            raise ConfigError(
                f"{location} stores no images; pass `images`, the images it was extracted from"
            )
        self.names = feature_names(self._cache, options)
        self.view = self._cache.view
        self.identity = self._cache.reader.data_identity
        if self.labels is not None:
            self.identity["label_set"] = self.labels.identity
        usable = self._cache.reader.usable_rows
        if manifest.state != "sealed" and processes.is_first:
            say(
                f"{location} is not complete: it has {len(usable)} of {manifest.num_samples} "
                "samples"
            )
        limited = usable[: options.limit]
        rows, self._held = split_rows(limited, self.keys(limited))
        self._loader = EpochLoader(
            Pinned(self._cache) if compute.device.type == "cuda" else self._cache,
            rows,
            self.names,
            batching(options, processes),
        )
        self._device = compute.device
        self._batch_size = options.batch_size
        self.decoder: nn.Module = self._cache.decoder(self.names).to(compute.device)
        self.label_decoder = self.labels.decoder().to(compute.device) if self.labels else None
        self.fit: Mapping[str, TapCodec] = self._cache.fit
        self.recipe: Json = manifest.recipe
        self.noise_floor = {
            name: manifest.recipe["codec"]["noise_floor"][name] for name in self.names
        }

    @property
    def num_batches(self) -> int:
        """Global batches per epoch."""
        return self._loader.num_batches

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of an array's maps."""
        return self._cache.shape(name)

    def epoch(self, epoch: int, start: int) -> Iterator[TrainBatch]:
        """Yield this process's micro-batches; a GPU copies the next one while it computes."""
        return copied_ahead(self._loader.epoch(epoch, start), self._device)

    def held_out(self) -> Iterator[TrainBatch]:
        """Yield the first view of each held-out sample: draw 0, not mirrored."""
        for start in range(0, len(self._held), self._batch_size):
            rows = self._held[start : start + self._batch_size]
            yield self._cache.batch(rows, [0] * len(rows), self.names)

    def ready(self, batch: TrainBatch) -> TrainBatch:
        """Return a batch on the device."""
        return batch.changed(lambda x: x.to(self._device))

    def keys(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return the keys of samples."""
        column = self._cache.reader.samples["key"]
        keys: list[str] = column.take(np.asarray(rows, np.int64)).to_pylist()
        return keys


def feature_names(cache: Cache, options: TrainOptions) -> list[str]:
    """Return the arrays that a student regresses: none if the feature loss has weight 0."""
    chosen = chosen_taps(cache, timestep=options.timestep, taps=options.taps)
    return [] if options.feature_weight == 0 else chosen
