"""A set of soft labels opened for reading, together with the cache that it labels.

Shape suffixes: B batch, N coefficients; V views, K classes, H rows, W columns.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtcache.cache.batch import LabelBatch, Rows
from dtcache.cache.cache import Cache
from dtcache.errors import CacheIncompleteError, CacheMismatchError
from dtcache.labels.label_decoder import LabelDecoder
from dtcache.options.images import ImagesOptions
from dtcache.recipe import Json
from dtcache.store.layout import LOGITS, SAMPLES
from dtcache.store.manifest import read_manifest
from dtcache.store.reader import Allowed
from dtcache.store.remote import Location, label_set_location


class LabelSet:
    """Soft labels of every row and view of a cache. Safe to share between threads."""

    def __init__(self, cache: Cache, name: str, *, unfinished: bool = False) -> None:
        """Open and check a label set; with `unfinished`, also one that is still being written.

        Raises UnknownLabelsError with the names of the existing sets, CacheIncompleteError,
        CacheMismatchError if the set was made from other features or images, or CacheDamagedError.
        """
        location = label_set_location(cache.reader.location, name)
        own = cache.reader.manifest
        if (
            isinstance(location, Path)
            and not unfinished
            and read_manifest(location).state != "sealed"
        ):
            raise CacheIncompleteError(
                f"{location}: the label set is not complete; run its dtcache label write command "
                "again to finish it"
            )
        self._stored = Cache(location, allow="incomplete" if unfinished else "nothing")
        manifest = self._stored.reader.manifest
        self.about: Json = manifest.recipe.get("labels") or {}
        for source, recorded, own_hash in (
            ("features", self.about.get("cache_fingerprint"), own.fingerprint),
            ("images", self.about.get("cache_samples"), own.files[SAMPLES]),
        ):
            if recorded != own_hash:
                raise CacheMismatchError(
                    f"{location}: made from other {source}: expected {own_hash[:16]}..., got "
                    f"{str(recorded)[:16]}...; write labels again with "
                    "dtcache label write, under another name"
                )
        self._cache = cache
        self.identity = manifest.fingerprint
        self.classes = tuple(self.about["classes"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, H, W) of the logits of one view."""
        channels, height, width = self._stored.shape(LOGITS)
        return channels // int(self.about["views"]), height, width

    def decoder(self) -> LabelDecoder:
        """Return a new decoder: a torch module to be moved to the student's device."""
        is_mirrored = self._cache.reader.manifest.is_mirrored
        return LabelDecoder(
            self._stored.fit[LOGITS],
            [is_mirrored(view) for view in range(self._cache.num_views)],
        )

    def batch(self, rows: Sequence[int] | Rows, views: Sequence[int] | Rows) -> LabelBatch:
        """Read the labels of B (row, view) pairs.

        Raises CacheDamagedError with the sample's key if a byte is wrong.
        """
        coefficients, scalars = self._stored.coefficients(
            rows, np.zeros(len(rows), np.int64), [LOGITS]
        )
        return LabelBatch(
            coefficients_BN=coefficients[LOGITS],
            scalars_B2=scalars[LOGITS],
            views_B=torch.as_tensor(np.asarray(views, np.int64)),
        )

    def logits(self, rows: Sequence[int] | Rows) -> Tensor:
        """Return the stored logits of every view of rows, fp32 (B, V, K, H, W)."""
        found = self.batch(rows, np.zeros(len(rows), np.int64))
        decoded: Tensor = self._decoder(found.coefficients_BN, found.scalars_B2)
        return decoded

    @functools.cached_property
    def _decoder(self) -> LabelDecoder:
        return self.decoder()


class LabelledCache(Cache):
    """A cache whose batches carry the soft labels of one of its label sets too."""

    def __init__(
        self,
        location: Location,
        name: str,
        images: Path | None = None,
        *,
        allow: Allowed = "nothing",
        reading: ImagesOptions | None = None,
    ) -> None:
        """Open a cache and one of its label sets. Raises the errors of `Cache` and `LabelSet`."""
        super().__init__(location, images, allow=allow, reading=reading)
        self.labels = LabelSet(self, name)
        self._again = functools.partial(
            LabelledCache, self.reader.location, name, self._source, allow=allow, reading=reading
        )

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Pickle as locations and a name."""
        return self._again, ()

    def label_batch(self, rows: Sequence[int] | Rows, views: Sequence[int] | Rows) -> LabelBatch:
        """Read the labels of B (row, view) pairs. Raises CacheDamagedError."""
        return self.labels.batch(rows, views)
