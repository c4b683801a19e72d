"""Several caches as one source of batches: teachers of the same images, and parts of a teacher.

Shape suffixes: B batch, C channels, H rows, W columns, N coefficients, M rows of one cache.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dtcache.cache.batch import LabelBatch, Rows, TrainBatch
from dtcache.cache.cache import Cache
from dtcache.cache.join import Join, JoinedTeacher
from dtcache.codec import FeatureDecoder, TapCodec
from dtcache.recipe import array_of
from dtcache.row_set import RowSet
from dtcache.store.layout import IMAGES


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredArray:
    """Where an array of a join lies in one cache."""

    name: str
    """Name of the array in the join, such as dinov3/t0/block5."""
    own_name: str
    """Name of the array in the cache."""
    key: str
    """Name of its coefficients in a batch: `name`, numbered if there are several image sets."""


class JoinedCache:
    """The batches of a join. Safe to share between threads.

    A row of the join is a row of an image set's first cache, plus the set's first row. A view is
    one of the smallest number of draws that each cache's number of draws divides; view v of a cache
    with D draws is draw v mod D.
    """

    def __init__(self, join: Join) -> None:
        """Serve all arrays of a join whose image sets each have images."""
        self._join = join
        first = join.sets[0].caches[0]
        self.view = first.view
        self.shard_rows = join.shard_rows
        self._flips = 2 if first.reader.manifest.recipe["flips"] else 1
        self._draws = {
            id(cache): cache.num_views // self._flips
            for images in join.sets
            for cache in images.caches
        }
        self.num_views = self._flips * math.lcm(*self._draws.values())
        self.usable = RowSet.joined([(images.first_row, images.usable) for images in join.sets])
        self._arrays = {
            teacher.name: [self._stored(teacher, number) for number in range(len(join.sets))]
            for teacher in join.teachers
        }

    def _stored(self, teacher: JoinedTeacher, number: int) -> dict[str, StoredArray]:
        """Return the arrays of a teacher in the cache of an image set, by name in the join."""
        arrays = {}
        for own_name in teacher.caches[number].names:
            name = joined_name(teacher, own_name)
            key = name if len(self._join.sets) == 1 else f"{name}@{number}"
            arrays[name] = StoredArray(name=name, own_name=own_name, key=key)
        return arrays

    @property
    def num_lacking(self) -> int:
        """Number of rows that some caches have features of, and others do not."""
        return sum(images.num_lacking for images in self._join.sets)

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of an array's maps."""
        cache, stored = self._first(name)
        return cache.shape(stored.own_name)

    def fit(self, names: Sequence[str]) -> dict[str, TapCodec]:
        """Return the codecs of arrays in the first image set's caches."""
        firsts = {name: self._first(name) for name in names}
        return {name: cache.fit[stored.own_name] for name, (cache, stored) in firsts.items()}

    def decoder(self, names: Sequence[str]) -> "JoinedDecoder":
        """Return a new decoder of arrays: a torch module, to be moved to a device."""
        keys: dict[str, list[str]] = {name: [] for name in names}
        codecs: dict[str, TapCodec] = {}
        for teacher in self._join.teachers:
            for cache, arrays in zip(teacher.caches, self._arrays[teacher.name], strict=True):
                for name, stored in arrays.items():
                    if name in keys:
                        keys[name].append(stored.key)
                        codecs[stored.key] = cache.fit[stored.own_name]
        return JoinedDecoder(codecs, keys, {name: self.shape(name) for name in names})

    def will_need(self, rows: Rows, names: Sequence[str]) -> None:
        """Prefetch images and some arrays of rows that will be read soon, into the page cache."""
        for number, _, inner in self._by_set(rows):
            images = self._join.sets[number]
            pictured = self._pictured(number)
            if stores_images(images.caches[pictured]):
                reader = images.caches[pictured].reader
                reader.will_need(IMAGES, images.rows_in(pictured, inner))
            for teacher in self._join.teachers:
                arrays = self._arrays[teacher.name][number]
                own_rows = images.rows_in(teacher.numbers[number], inner)
                for array in {array_of(arrays[name].own_name) for name in names if name in arrays}:
                    teacher.caches[number].reader.will_need(array, own_rows)

    def batch(
        self, rows: Sequence[int] | Rows, views: Sequence[int] | Rows, names: Sequence[str]
    ) -> TrainBatch:
        """Read B (row, view) pairs. Raises CacheDamagedError with the sample's key."""
        rows = np.asarray(rows, np.int64)
        views = np.asarray(views, np.int64)
        pixels = np.empty((len(rows), 3, self.view.height, self.view.width), np.uint8)
        coefficients: dict[str, Tensor] = {}
        positions: dict[str, Tensor] = {}
        scalars = {name: torch.empty(len(rows), 2) for name in names}
        labels: LabelBatch | None = None
        for number, at, inner in self._by_set(rows):
            images = self._join.sets[number]
            pictured = self._pictured(number)
            read = images.caches[pictured].images(images.rows_in(pictured, inner))
            for position, image, view in zip(at.tolist(), read, views[at].tolist(), strict=True):
                is_mirrored = self._flips == 2 and view % 2 == 1
                pixels[position] = image[:, :, ::-1] if is_mirrored else image
            for teacher in self._join.teachers:
                cache = teacher.caches[number]
                arrays = self._arrays[teacher.name][number]
                chosen = [arrays[name] for name in names if name in arrays]
                values, of_views = cache.coefficients(
                    images.rows_in(teacher.numbers[number], inner),
                    self._views_in(cache, views[at]),
                    [stored.own_name for stored in chosen],
                )
                for stored in chosen:
                    coefficients[stored.key] = values[stored.own_name]
                    scalars[stored.name][at] = of_views[stored.own_name]
                    if len(self._join.sets) > 1:
                        positions[stored.key] = torch.from_numpy(at)
            first = images.caches[0]
            labels = first.label_batch(inner, self._views_in(first, views[at]))
        return TrainBatch(
            rows=rows,
            images_BCHW=torch.from_numpy(pixels),
            coefficients=coefficients,
            scalars=scalars,
            labels=labels,
            positions=positions,
        )

    def keys(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return the keys of rows."""
        keys = np.empty(len(rows), object)
        for number, at, inner in self._by_set(np.asarray(rows, np.int64)):
            keys[at] = self._join.sets[number].caches[0].reader.samples.keys(inner)
        return keys.tolist()

    def _views_in(self, cache: Cache, views: Rows) -> Rows:
        """Return the views of a cache that show the same flips as views of the join."""
        draws, flips = np.divmod(views, self._flips)
        own: Rows = draws % self._draws[id(cache)] * self._flips + flips
        return own

    def _by_set(self, rows: Rows) -> list[tuple[int, Rows, Rows]]:
        """Return, for each image set that has some of the rows, positions and rows of the set."""
        edges = np.array([images.first_row for images in self._join.sets])
        of_row = np.searchsorted(edges, rows, side="right") - 1
        parts = []
        for number in np.unique(of_row).tolist():
            at = np.flatnonzero(of_row == number)
            parts.append((number, at, rows[at] - edges[number]))
        return parts

    def _pictured(self, number: int) -> int:
        """Return the number of the first cache of an image set that has the images."""
        caches = self._join.sets[number].caches
        return next(n for n, cache in enumerate(caches) if cache.has_images)

    def _first(self, name: str) -> tuple[Cache, StoredArray]:
        """Return the cache of the first image set that has an array, and where it lies in it."""
        for teacher in self._join.teachers:
            stored = self._arrays[teacher.name][0].get(name)
            if stored is not None:
                return teacher.caches[0], stored
        raise KeyError(name)


class JoinedDecoder(nn.Module):
    """Decodes the coefficients of a join's batches, each with the codec of its own cache."""

    def __init__(
        self,
        codecs: Mapping[str, TapCodec],
        keys: Mapping[str, Sequence[str]],
        shapes: Mapping[str, tuple[int, int, int]],
    ) -> None:
        """Take the codecs by key, and the keys and (C, H, W) of every array."""
        super().__init__()
        self._decoder = FeatureDecoder(dict(codecs))
        self._keys = {name: list(of_array) for name, of_array in keys.items()}
        self._shapes = dict(shapes)

    def forward(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Return whitened features by array, fp32 (B, C, H, W), on the device of the batch."""
        decoded: dict[str, Tensor] = self._decoder(batch.coefficients)
        return {name: self._whole(name, batch, decoded) for name in self._keys}

    def _whole(self, name: str, batch: TrainBatch, decoded: Mapping[str, Tensor]) -> Tensor:
        """Return the maps of an array, put together from the caches that hold its rows."""
        keys = [key for key in self._keys[name] if key in decoded]
        if not batch.positions:
            return decoded[keys[0]]
        maps_BCHW = decoded[keys[0]].new_empty(len(batch.rows), *self._shapes[name])
        for key in keys:
            maps_BCHW[batch.positions[key]] = decoded[key]
        return maps_BCHW


def joined_name(teacher: JoinedTeacher, own_name: str) -> str:
    """Return the name of a cache's array in a join: dinov3/t0/block5, or t0/block5 if alone."""
    return f"{teacher.name}/{own_name}" if teacher.name else own_name


def stores_images(cache: Cache) -> bool:
    """Return whether a cache stores its images itself."""
    return IMAGES in cache.reader.manifest.arrays
