"""A sealed cache as batches for training: order and views are pure functions of (seed, epoch)."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.codec import FeatureDecoder, FittedTap, HostDecoder, sha256_fit
from dtcache.errors import BadImageError, CacheDamagedError, CodecError, ConfigError
from dtcache.images.source import permuted
from dtcache.images.stored import decode_stored
from dtcache.spec import ViewSpec
from dtcache.store.layout import DATA, IMAGES, read_fit
from dtcache.store.manifest import CacheManifest
from dtcache.store.reader import CacheReader

LOOKAHEAD = 4
"""Batches read ahead of the student."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """One batch on the host, entropy-decoded; a FeatureDecoder turns its coefficients into targets."""

    rows: NDArray[np.int64]
    """(B,): rows of the cache."""
    images_BCHW: Tensor
    """uint8 RGB; already mirrored where the view is."""
    coefficients: dict[str, Tensor]
    """(B, n) int16 by array."""
    scalars: dict[str, Tensor]
    """(B, 2) fp32 sigma and mu by array: raw = whitened * sigma + mu."""


def load_fit(root: Path, manifest: CacheManifest) -> dict[str, FittedTap]:
    """Read a cache's fitted codec by array. Raises CacheDamagedError where it is not the one that the recipe names."""
    try:
        arrays: dict[str, dict[str, Any]] = {name: read_fit(root / DATA, name) for name in manifest.tap_names}
        fit = {name: FittedTap(**found) for name, found in arrays.items()}
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CacheDamagedError(
            f"{root}: the codec's arrays are damaged ({error}); delete this cache and extract it again"
        ) from error
    if sha256_fit(fit) != manifest.recipe["codec"]["fit_sha256"]:
        raise CacheDamagedError(
            f"{root}: the codec's arrays are not the fitted ones; delete this cache and extract it again"
        )
    return fit


class Cache:
    """A sealed cache: its samples, its images, its features."""

    def __init__(self, root: Path) -> None:
        """Open and check a cache. Raises CacheNotFoundError, CacheIncompleteError or CacheDamagedError."""
        self.reader = CacheReader(root)
        recipe = self.reader.manifest.recipe
        self.view = ViewSpec(**recipe["view"])
        self.names = self.reader.manifest.tap_names
        self.fit = load_fit(root, self.reader.manifest)
        self._host = HostDecoder(self.fit)

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of a tap's maps."""
        _, height, width = self.fit[name].classes.shape
        return len(self.fit[name].mean), height, width

    def decoder(self, names: Sequence[str]) -> FeatureDecoder:
        """Return a new device-side decoder of some taps."""
        return FeatureDecoder({name: self.fit[name] for name in names})

    def batch(self, rows: Sequence[int], views: Sequence[int], names: Sequence[str]) -> TrainBatch:
        """Read (row, view) pairs. Raises CacheDamagedError naming the sample where a byte is wrong."""
        keys = self.reader.samples["key"]
        pixels = []
        for row, view, payload in zip(rows, views, self.reader.payloads(IMAGES, rows, [0] * len(rows)), strict=True):
            try:
                image = decode_stored(payload, self.view)
            except BadImageError as error:
                raise CacheDamagedError(f"{self.reader.root}: image {keys[int(row)]}: {error}") from error
            pixels.append(image[:, :, ::-1] if view else image)
        coefficients, scalars = {}, {}
        for name in names:
            try:
                coefficients[name], scalars[name] = self._host.decode(name, self.reader.payloads(name, rows, views))
            except CodecError as error:
                some = ", ".join(str(keys[int(row)]) for row in rows[:3])
                raise CacheDamagedError(f"{self.reader.root}: {name} of a batch with {some}: {error}") from error
        return TrainBatch(
            rows=np.asarray(rows, np.int64),
            images_BCHW=torch.from_numpy(np.stack(pixels)),
            coefficients=coefficients,
            scalars=scalars,
        )


class EpochLoader:
    """Batches of an epoch, read ahead in threads; each row once, the short last batch dropped."""

    def __init__(
        self, cache: Cache, rows: NDArray[np.int64], names: Sequence[str], *, batch_size: int, seed: int, threads: int
    ) -> None:
        """Serve `rows` of a cache. Raises ConfigError where they do not fill one batch."""
        if not 0 < batch_size <= len(rows):
            raise ConfigError(
                f"--batch-size {batch_size}: expected 1 to {len(rows)}, the samples left for training; "
                "lower it or cache more images"
            )
        self._cache, self._rows, self._names = cache, rows, list(names)
        self._batch_size, self._seed, self._threads = batch_size, seed, threads
        self.num_batches = len(rows) // batch_size

    def order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rows and views of an epoch, in order: a pure function of (seed, epoch)."""
        rows = self._rows[permuted(len(self._rows), seed=self._seed, stream=f"epoch-{epoch}")]
        if self._cache.reader.manifest.num_views == 1:
            return rows, np.zeros(len(rows), np.int64)
        return rows, permuted(len(self._rows), seed=self._seed, stream=f"views-{epoch}") % 2

    def epoch(self, epoch: int, start: int = 0) -> Iterator[TrainBatch]:
        """Yield the batches of an epoch from batch `start` on."""
        rows, views = self.order(epoch)

        def read(index: int) -> TrainBatch:
            part = slice(index * self._batch_size, (index + 1) * self._batch_size)
            return self._cache.batch(rows[part], views[part], self._names)  # type: ignore[arg-type]

        todo = iter(range(start, self.num_batches))
        with ThreadPoolExecutor(max_workers=self._threads, thread_name_prefix="cache") as pool:
            waiting: deque[Future[TrainBatch]] = deque()
            try:
                for index in todo:
                    waiting.append(pool.submit(read, index))
                    if len(waiting) >= LOOKAHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
