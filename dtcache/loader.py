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

from dtcache.codec import FeatureDecoder, FittedTap, HalfTap, HostDecoder, TapFit, sha256_fit
from dtcache.errors import BadImageError, CacheDamagedError, CodecError, ConfigError
from dtcache.images import LinkedImages, permuted
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
    """(B, n) by array: int16, or fp16 where features are stored so."""
    scalars: dict[str, Tensor]
    """(B, 2) fp32 sigma and mu by array: raw = whitened * sigma + mu."""


def load_fit(root: Path, manifest: CacheManifest) -> dict[str, TapFit]:
    """Read a cache's fitted codec by array. Raises CacheDamagedError where it is not the one that the recipe names."""
    try:
        arrays: dict[str, dict[str, Any]] = {name: read_fit(root / DATA, name) for name in manifest.tap_names}
        kind = HalfTap if manifest.recipe["codec"]["name"] == "float16" else FittedTap
        fit: dict[str, TapFit] = {name: kind(**found) for name, found in arrays.items()}
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

    def __init__(self, root: Path, images: Path | None = None) -> None:
        """Open and check a cache, with the source of its images where it stores none.

        Raises CacheNotFoundError, CacheIncompleteError or CacheDamagedError, and ImagesError for another source.
        """
        self.reader = CacheReader(root)
        recipe = self.reader.manifest.recipe
        self.view = ViewSpec(**recipe["view"])
        self.names = self.reader.manifest.tap_names
        self.fit = load_fit(root, self.reader.manifest)
        self._host = HostDecoder(self.fit)
        self._linked: LinkedImages | None = None
        if images is not None:
            keys, hashes = (self.reader.samples[name].to_pylist() for name in ("key", "content_sha256"))
            self._linked = LinkedImages(images, keys, hashes, self.view)

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of a tap's maps."""
        return self.fit[name].shape

    def decoder(self, names: Sequence[str]) -> FeatureDecoder:
        """Return a new device-side decoder of some taps."""
        return FeatureDecoder({name: self.fit[name] for name in names})

    def batch(self, rows: Sequence[int], views: Sequence[int], names: Sequence[str]) -> TrainBatch:
        """Read (row, view) pairs. Raises CacheDamagedError naming the sample where a byte is wrong."""
        images = self.images(rows)
        coefficients, scalars = self.coefficients(rows, views, names)
        mirrored = [self.reader.manifest.is_mirrored(int(view)) for view in views]
        pixels = [image[:, :, ::-1] if flip else image for image, flip in zip(images, mirrored, strict=True)]
        return TrainBatch(
            rows=np.asarray(rows, np.int64),
            images_BCHW=torch.from_numpy(np.stack(pixels)),
            coefficients=coefficients,
            scalars=scalars,
        )

    def images(self, rows: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Return unmirrored views (3, H, W) of rows.

        Raises CacheDamagedError naming the sample where a byte is wrong, ConfigError where the cache stores no images
        and was opened without their source.
        """
        if self._linked is not None:
            return [self._linked.pixels(int(row)) for row in rows]
        if IMAGES not in self.reader.manifest.arrays:
            raise ConfigError(f"{self.reader.root} stores no images: give those that it was extracted from (--images)")
        found = []
        for row, payload in zip(rows, self.reader.payloads(IMAGES, rows, [0] * len(rows)), strict=True):
            try:
                found.append(decode_stored(payload, self.view))
            except BadImageError as error:
                key = self.reader.samples["key"][int(row)]
                raise CacheDamagedError(f"{self.reader.root}: image {key}: {error}") from error
        return found

    def coefficients(
        self, rows: Sequence[int], views: Sequence[int], names: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return coefficients (B, n) and (sigma, mu) pairs (B, 2) by array. Raises CacheDamagedError."""
        coefficients, scalars = {}, {}
        for name in names:
            try:
                coefficients[name], scalars[name] = self._host.decode(name, self.reader.payloads(name, rows, views))
            except CodecError as error:
                some = ", ".join(str(self.reader.samples["key"][int(row)]) for row in rows[:3])
                raise CacheDamagedError(f"{self.reader.root}: {name} of a batch with {some}: {error}") from error
        return coefficients, scalars


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
        views = permuted(len(self._rows), seed=self._seed, stream=f"views-{epoch}")
        return rows, views % self._cache.reader.manifest.num_views

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
