"""A cache opened for reading: samples, images, features.

Shape suffixes: B batch, V views, C channels, H rows, W columns.
"""

import copy
import functools
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, overload

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.arguments import list_of, require
from dtcache.cache.batch import NO_LABEL, LabelBatch, Rows, TrainBatch
from dtcache.cache.fitted_codec import load_fit
from dtcache.codec import (
    FeatureDecoder,
    HostDecoder,
)
from dtcache.errors import (
    AGAIN,
    BadImageError,
    CacheDamagedError,
    CacheMismatchError,
    ConfigError,
    PayloadError,
    UnknownIndexError,
    UnknownSampleError,
)
from dtcache.images import LinkedImages
from dtcache.images.stored_images import decode_stored
from dtcache.options.images import ImagesOptions
from dtcache.recipe import Json, ViewSpec, array_of, tap_name
from dtcache.store.layout import IMAGES
from dtcache.store.reader import Allowed, CacheReader
from dtcache.store.remote import Location
from dtcache.whitening import unwhiten

if TYPE_CHECKING:
    import dask.array as da

    from dtcache.cache.cache_loader import CacheLoader


# A named tuple, because torch's default collate and pin_memory understand no dataclass.
class CachedSample(NamedTuple):
    """One usable sample of a cache, decoded."""

    key: str
    """Its path or name inside the image source."""
    label: int
    """Its class number, or -1 if the image has no class."""
    image_CHW: Tensor
    """uint8 RGB in 0..255, (3, H, W), not mirrored."""
    features: dict[str, Tensor]
    """By array, such as t150/stride8: fp32 (V, C, H, W), not whitened, as the teacher computed it.

    If the cache has flips, views with an odd index are features of the mirrored image.
    """

    def __repr__(self) -> str:
        """Return one line: key, label and arrays with their shapes (V, C, H, W)."""
        arrays = ", ".join(f"{name} {tuple(maps.shape)}" for name, maps in self.features.items())
        return f"CachedSample {self.key!r}, label {self.label}: {arrays}"


class Cache:
    """A sequence of the usable samples, which also yields batches. Safe to share between threads.

    It is a map-style dataset for torch's DataLoader, with workers of either start method: a pickle
    holds the cache's path, and a forked process opens the files again. Samples whose image failed
    are left out of it. Rows are permuted: pair samples with other data by `key`, never by position
    in a sorted list of files.
    """

    def __init__(
        self,
        location: Location,
        images: Path | None = None,
        *,
        allow: Allowed = "nothing",
        reading: ImagesOptions | None = None,
    ) -> None:
        """Open and check a cache.

        `images` is the source of the images, for a cache that does not store them; `reading` says
        how it is read. If `allow` is incomplete, an unfinished cache opens with the shards
        committed so far. If `allow` is damage, shards may also be lost; such a cache is for
        inspection, not for training.

        Raises CacheNotFoundError, CacheIncompleteError or CacheDamagedError, and ImagesError if
        `images` is a different source.
        """
        self.reader = CacheReader(location, allow=allow)
        recipe = self.reader.manifest.recipe
        self.view = ViewSpec(**recipe["view"])
        self.names = self.reader.manifest.tap_names
        self.fit = load_fit(self.reader.root, self.reader.manifest)
        self._host = HostDecoder(self.fit)
        images = images.resolve() if images is not None else None
        self._source = images
        self._reading = reading
        self.allow = allow
        self._linked: LinkedImages | None = None
        if images is not None and IMAGES in self.reader.manifest.arrays:
            raise ConfigError(f"{location} stores its images: open it without `images`")
        if images is not None:
            samples = self.samples
            self._linked = LinkedImages(
                images, samples["key"], samples["content_sha256"], self.view, reading
            )

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Pickle as locations."""
        again = functools.partial(Cache, allow=self.allow, reading=self._reading)
        return again, (self.reader.location, self._source)

    @property
    def num_views(self) -> int:
        """Views per row."""
        return self.reader.manifest.num_views

    @property
    def shard_rows(self) -> int:
        """Rows per shard."""
        return int(self.reader.manifest.recipe["shard_rows"])

    @functools.cached_property
    def samples(self) -> pa.Table:
        """One row per sample: row, key, label, content_sha256, failure.

        The first use reads the whole index: about 80 bytes of memory per sample.
        """
        return self.reader.samples.table()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes by number; empty if the images have none."""
        return tuple(self.reader.manifest.classes or ())

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The teacher's timesteps, in 0..999, at which features were cached."""
        return tuple(self.reader.manifest.recipe["teacher"]["timesteps"])

    @property
    def recipe(self) -> Json:
        """All that determines the features: teacher, view, codec, samples, seed; as plain JSON."""
        return copy.deepcopy(self.reader.manifest.recipe)

    def close(self) -> None:
        """Close the cache's files. Later reads raise CacheError."""
        self.reader.close()

    def __enter__(self) -> Self:
        """Return the cache, which is closed at the end of the `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the cache."""
        self.close()

    def __repr__(self) -> str:
        """Return three lines: path, samples and views, arrays with their shapes (C, H, W)."""
        rows = len(self.reader.samples)
        images = "with images" if self.has_images else "without images"
        arrays = ", ".join(f"{name} {self.shape(name)}" for name in self.names)
        return (
            f"dtcache.open({str(self.reader.location)!r})\n"
            f"  {len(self)} of {rows} samples usable, {self.num_views} views, "
            f"{len(self.classes)} classes, {self.view.width}x{self.view.height} px, {images}\n"
            f"  {arrays}"
        )

    def __len__(self) -> int:
        """Return the number of usable samples: those whose image did not fail."""
        return len(self.reader.usable)

    def __contains__(self, key: object) -> bool:
        """Return whether a usable sample has this key. Nothing is decoded."""
        return isinstance(key, str) and int(self._rows_of([key])[0]) in self.reader.usable

    def __iter__(self) -> Iterator[CachedSample]:
        """Yield every usable sample, in the order of the rows."""
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int | str) -> CachedSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[CachedSample]: ...
    def __getitem__(self, index: int | str | slice) -> CachedSample | list[CachedSample]:
        """Return a usable sample by its position or key, or a list of them by a slice.

        Raises UnknownIndexError (an IndexError) for a position outside the cache,
        UnknownSampleError for an unknown key or a failed image, and ConfigError for another type.
        """
        if isinstance(index, str):
            rows = self._rows_of([index])
            self._require_known([index], rows)
            return self._samples_of(rows)[0]
        if isinstance(index, slice):
            return self.__getitems__(range(*_slice_within(index, len(self))))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[CachedSample]:
        """Return usable samples by their positions, read at once, as DataLoader requests them.

        Raises UnknownIndexError for a position outside the cache.
        """
        require("indices", indices, Iterable, "a list of integers")
        count = len(self)
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int | np.integer):
                raise ConfigError(
                    f"`index` {index!r}: expected an integer, a slice or a key, got "
                    f"{type(index).__name__}; pass one of these"
                )
            if not -count <= index < count:
                raise UnknownIndexError(
                    f"{self.reader.location} has {count} usable samples, got index {index}; pass "
                    f"{-count} to {count - 1}"
                )
        positions = np.array(indices, np.int64).reshape(-1)
        return self._samples_of(self.reader.usable.take(positions % max(1, count)))

    def features(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return the features of B samples by array: fp32 (B, V, C, H, W), not whitened.

        Raises UnknownSampleError for a key that the cache does not have, or whose image failed, and
        ConfigError if `keys` is a single string.
        """
        keys = list_of("keys", keys, str, "keys")
        rows = self._rows_of(keys)
        self._require_known(keys, rows)
        return self.raw(self.names, rows)

    def _rows_of(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the rows of keys, -1 for an unknown one."""
        try:
            wanted = pa.array(keys, pa.string())
        except (UnicodeEncodeError, pa.ArrowInvalid):  # a lone surrogate: no cache has such a key
            return np.array([-1] * len(keys), np.int64)
        return self.reader.samples.rows_of(wanted)

    def _require_known(self, keys: Sequence[str], rows: NDArray[np.int64]) -> None:
        """Raise UnknownSampleError for the first key without a row or without features."""
        for key, row in zip(keys, rows.tolist(), strict=True):
            if row < 0:
                raise UnknownSampleError(
                    f"{self.reader.location}: no sample has the key {key!r}; cache.samples['key'] "
                    "lists them"
                )
        self._require_usable(rows)

    def _samples_of(self, rows: NDArray[np.int64]) -> list[CachedSample]:
        """Return the decoded samples of rows, which are read at once."""
        if not len(rows):
            return []
        images = self.images(rows)
        features = self.raw(self.names, rows)
        columns = self.reader.samples.take(rows).select(["key", "label"]).to_pydict()
        return [
            CachedSample(
                key=key,
                label=NO_LABEL if label is None else label,
                image_CHW=torch.from_numpy(image),
                features={name: maps[i] for name, maps in features.items()},
            )
            for i, (key, label, image) in enumerate(
                zip(columns["key"], columns["label"], images, strict=True)
            )
        ]

    def loader(
        self,
        *,
        batch_size: int,
        names: Sequence[str] | None = None,
        whitened: bool = False,
        shuffle: str = "full",
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        threads: int = 2,
        device: torch.device | str | None = None,
        pin_memory: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> "CacheLoader":
        """Return an iterable of batches (`Batch`) that serves every usable sample once per epoch.

        - `batch_size`: samples of a batch over all processes; a multiple of their number. The last
          batch may be short; `drop_last` leaves it out.
        - `names`: arrays such as t150/stride8; None serves all.
        - `whitened`: if true, `batch.targets` are whitened per sample, (raw - mu) / sigma;
          otherwise they are in the teacher's own scale, as `features` returns them.
        - `shuffle`: full permutes all samples; block permutes and mixes contiguous blocks, for cold
          disks; none keeps the order of the rows, each in view 0.
        - `seed`, `epoch`: the order is a function of both. Iterations count the epoch up from
          `epoch`; `set_epoch` sets it.
        - `threads` read ahead; `device` moves batches (on CUDA in a side stream, from page-locked
          memory); `pin_memory` only locks their pages.
        - `rank` and `world_size` default to those of torch.distributed when an iteration begins.

        Raises ConfigError with the argument's name if it cannot work, or if the cache has no usable
        sample or no images.
        """
        from dtcache.cache.cache_loader import CacheLoader, LoaderSpec

        return CacheLoader(
            self,
            LoaderSpec(
                batch_size=batch_size,
                names=names,
                whitened=whitened,
                shuffle=shuffle,
                seed=seed,
                epoch=epoch,
                drop_last=drop_last,
                threads=threads,
                device=device,
                pin_memory=pin_memory,
                rank=rank,
                world_size=world_size,
            ),
        )

    def stack(self, tap: str, *, timestep: int | None = None) -> "da.Array":
        """Return a tap's decoded features as a lazy dask array, fp32 (N, V, C, H, W).

        Rows are NaN if their image failed or their shard is missing. `timestep` is optional if the
        cache has only one. Raises ConfigError with the arrays that the cache has.
        """
        from dtcache.cache.dask_array import lazy_stack

        require("tap", tap, str, "a str")
        if timestep is not None:
            require("timestep", timestep, Integral, "an integer")
        timesteps = self.reader.manifest.recipe["teacher"]["timesteps"]
        if timestep is None and len(timesteps) > 1:
            raise ConfigError(
                f"{self.reader.location} has several timesteps: pass `timestep`, one of "
                f"{', '.join(map(str, timesteps))}"
            )
        name = tap_name(timesteps[0] if timestep is None else timestep, tap)
        if name not in self.names:
            raise ConfigError(
                f"{self.reader.location} has no {name}, only {', '.join(self.names)}; pass one of "
                "these"
            )
        decode = StoredFeatures(
            self.reader.location, self.reader.manifest.identity, self.allow, name
        )
        shape = (len(self.reader.samples), self.num_views, *self.shape(name))
        return lazy_stack(decode, shape, f"dtcache-{decode.identity[:16]}-{name}")

    @functools.cached_property
    def _decoder(self) -> FeatureDecoder:
        return self.decoder(self.names)

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of an array's maps. Raises ConfigError for an unknown array."""
        self._require_arrays("name", [name])
        return self.fit[name].shape

    def decoder(self, names: Sequence[str]) -> FeatureDecoder:
        """Return a new decoder of some arrays: a torch module, to be moved to a device.

        It turns coefficients (B, N) into whitened features (B, C, H, W) by array. Raises
        ConfigError for an unknown array.
        """
        names = list_of("names", names, str, "arrays")
        self._require_arrays("names", names)
        return FeatureDecoder({name: self.fit[name] for name in names})

    def batch(
        self, rows: Sequence[int] | Rows, views: Sequence[int] | Rows, names: Sequence[str]
    ) -> TrainBatch:
        """Read B (row, view) pairs.

        Raises CacheDamagedError with the sample's key if a byte is wrong.
        """
        images = self.images(rows)
        coefficients, scalars = self.coefficients(rows, views, names)
        pixels = np.empty((len(images), 3, self.view.height, self.view.width), np.uint8)
        for index, (image, view) in enumerate(zip(images, views, strict=True)):
            pixels[index] = (
                image[:, :, ::-1] if self.reader.manifest.is_mirrored(int(view)) else image
            )
        return TrainBatch(
            rows=np.asarray(rows, np.int64),
            images_BCHW=torch.from_numpy(pixels),
            coefficients=coefficients,
            scalars=scalars,
            labels=self.label_batch(rows, views),
        )

    def label_batch(
        self, rows: Sequence[int] | Rows, views: Sequence[int] | Rows
    ) -> LabelBatch | None:
        """Return None: this cache was opened without a label set."""
        return None

    def images(self, rows: Sequence[int] | Rows) -> list[NDArray[np.uint8]]:
        """Return the images of rows, each uint8 RGB (3, H, W), not mirrored.

        Raises CacheDamagedError with the sample's key if a byte is wrong, UnknownSampleError for an
        image that failed, and ConfigError for a row outside the cache, or if the cache does not
        store its images and was opened without `images`.
        """
        self.reader.require_open()
        self._require_rows(rows)
        if self._linked is not None:
            return [self._linked.pixels(int(row)) for row in rows]
        self.require_images()
        pixels = []
        for row, payload in zip(
            rows, self.reader.payloads(IMAGES, rows, np.zeros(len(rows))), strict=True
        ):
            try:
                pixels.append(decode_stored(payload, self.view))
            except BadImageError as error:
                key = self.reader.samples.key(int(row))
                raise CacheDamagedError(f"{self.reader.location}: image {key}: {error}") from error
        return pixels

    def coefficients(
        self, rows: Sequence[int] | Rows, views: Sequence[int] | Rows, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the coefficients (B, N) and the (sigma, mu) pairs (B, 2), each by tap.

        The payloads of a timestep are read once, and only the taps `names` are decoded. Raises
        CacheDamagedError with the sample's key if a byte is wrong.
        """
        coefficients = {}
        scalars = {}
        for array, taps in groupby(sorted(names, key=array_of), key=array_of):
            payloads = self.reader.payloads(array, rows, views)
            label = array
            try:
                sections = self._host.sections(array, payloads)
                for name in taps:
                    label = name
                    coefficients[name], scalars[name] = self._host.decode(name, sections[name])
            except PayloadError as error:
                key = self.reader.samples.key(int(rows[error.index]))
                raise CacheDamagedError(
                    f"{self.reader.location}: {label} of sample {key}: {error}; {AGAIN}"
                ) from error
        return (
            {name: coefficients[name] for name in names},
            {name: scalars[name] for name in names},
        )

    def will_need(self, rows: Rows, names: Sequence[str]) -> None:
        """Prefetch images and some arrays of rows that will be read soon, into the page cache."""
        for name in {IMAGES, *map(array_of, names)} & set(self.reader.manifest.arrays):
            self.reader.will_need(name, rows)

    def raw(self, names: Sequence[str], rows: Rows) -> dict[str, Tensor]:
        """Return features of all views of rows by tap, fp32 (B, V, C, H, W), not whitened."""
        views = self.reader.manifest.num_views
        if not len(rows):
            return {name: torch.empty(0, views, *self.shape(name)) for name in names}
        pairs = np.repeat(rows, views), np.tile(np.arange(views), len(rows))
        values, scalars = self.coefficients(*pairs, names)
        maps = self._decoder(values)
        return {
            name: unwhiten(maps[name], scalars[name]).view(len(rows), views, *self.shape(name))
            for name in names
        }

    def require_images(self) -> None:
        """Raise ConfigError if the cache does not store its images and was opened without them."""
        if not self.has_images:
            raise ConfigError(
                f"{self.reader.location} stores no images: pass `images`, the source that it was "
                "extracted from"
            )

    @property
    def has_images(self) -> bool:
        """Whether the cache stores its images or was opened with their source."""
        return self._linked is not None or IMAGES in self.reader.manifest.arrays

    def _require_arrays(self, argument: str, names: Iterable[str]) -> None:
        """Raise ConfigError with the argument's name for an array that the cache does not have."""
        for name in names:
            require(argument, name, str, "a str")
            if name not in self.names:
                raise ConfigError(
                    f"`{argument}` {name!r}: the cache has {', '.join(self.names)}; pass one of "
                    "these"
                )

    def _require_rows(self, rows: Sequence[int] | Rows) -> None:
        """Raise ConfigError for anything but rows of the cache."""
        if not isinstance(rows, np.ndarray):
            rows = list_of("rows", rows, Integral, "rows")
        count = len(self.reader.samples)
        outside = [int(row) for row in rows if not 0 <= row < count]
        if outside:
            raise ConfigError(
                f"`rows` {outside[0]}: expected rows 0 to {count - 1} of the cache; pass such rows"
            )

    def _require_usable(self, rows: Rows) -> None:
        for sample in self.reader.samples.take(rows).to_pylist():
            if sample["failure"] is not None:
                raise UnknownSampleError(
                    f"{self.reader.location}: sample {sample['key']} has no features: "
                    f"{sample['failure']}"
                )


def _slice_within(index: slice, count: int) -> tuple[int, int, int]:
    """Return start, stop and step of a slice. Raises ConfigError if it is not one of integers."""
    try:
        return index.indices(count)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`index` {index}: {error}; pass integers") from error


class StoredFeatures:
    """The decoded features of one array, by row. Safe to share between threads.

    A pickle holds the cache's location; each process opens the cache at its first call.
    """

    def __init__(self, location: Location, identity: str, allow: Allowed, name: str) -> None:
        """Select an array of the cache at `location` whose manifest has this `identity`."""
        self.location = location
        self.identity = identity
        self.allow = allow
        self.name = name
        self._lock = threading.Lock()
        self._cache: Cache | None = None

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Pickle as a location."""
        return StoredFeatures, (self.location, self.identity, self.allow, self.name)

    def __call__(self, rows: Rows) -> NDArray[np.float32]:
        """Return the features of R rows, fp32 (R, V, C, H, W); NaN for a row without features.

        Raises CacheMismatchError if a different cache is in the folder now.
        """
        cache = self._opened()
        usable = cache.reader.usable.has(rows)
        features = np.full(
            (len(rows), cache.num_views, *cache.shape(self.name)), np.nan, np.float32
        )
        if usable.any():
            features[usable] = cache.raw([self.name], rows[usable])[self.name].numpy()
        return features

    def _opened(self) -> Cache:
        with self._lock:
            if self._cache is None:
                cache = Cache(self.location, allow=self.allow)
                if cache.reader.manifest.identity != self.identity:
                    raise CacheMismatchError(
                        f"{self.location}: expected the cache that the stack was made from, got a "
                        "different cache, or the same one, finished since; open it and make the "
                        "stack again"
                    )
                self._cache = cache
            return self._cache
