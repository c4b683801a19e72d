"""Estimates of the bytes of a cache: its features and its images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numcodecs.zstd import compress

from dtcache.codec import FittedTap, sections_of
from dtcache.codec.fit import TapStatistics
from dtcache.codec.pca_dct import quantise
from dtcache.images import ImageSource, load_views
from dtcache.images.stored_images import encode_stored, image_bound
from dtcache.recipe import ViewSpec
from dtcache.samples import SampleList
from dtcache.store.layout import padded_length
from dtcache.store.shard import CRC_BYTES, ENTRY_BYTES
from dtcache.store.tag import TAG_BYTES
from dtcache.store.zstd_frame import ZSTD_LEVEL, pack_frame

SAMPLED_IMAGES = 16
SIZED_VIEWS = 48
ROW_BYTES = 60
"""Bytes of a row in the sample index, compressed: a hash, a key and a label."""
ARRAY_BYTES = 50
"""Bytes of the name, type and shape of one fitted array, compressed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSize:
    """Estimates the bytes of a cache's features: all stored bytes except those of images."""

    images: int
    """Rows of the cache."""
    views: int
    """Views per row."""
    target: float
    """Bytes per view that the codec is fitted for."""
    row_bytes: float = ROW_BYTES
    """Bytes of a row besides its views."""
    sized_views: int = SIZED_VIEWS
    """Views of the fit that are encoded to estimate the size of a chunk."""

    def bytes_per_view(
        self, fit: Mapping[str, FittedTap], statistics: Mapping[str, TapStatistics]
    ) -> float:
        """Return the bytes per view: chunks, index entries, and a share of the row and of the fit.

        That share is at most half the target. Otherwise the fit would leave the chunks of a cache
        of few images no bytes.
        """
        coded: dict[str, list[bytes]] = {}
        for name, fitted in fit.items():
            coder = fitted.section_coder()
            coefficients = statistics[name].coefficients[0, : self.sized_views]
            flat = torch.from_numpy(coefficients.reshape(len(coefficients), -1)[:, fitted.live])
            step = torch.from_numpy(fitted.class_step[fitted.live_classes])
            values = quantise(flat, step).numpy().astype(np.int16)
            coded[name] = [coder.pack(v, 0.01, 1.01) for v in values]
        chunks = 0.0
        for sections in sections_of(fit).values():
            # Large taps keep the coefficients of fewer views.
            views = min(len(coded[name]) for name in sections.bounds)
            payloads = [
                bytes(TAG_BYTES) + sections.join([coded[name][i] for name in sections.bounds])
                for i in range(views)
            ]
            length = padded_length(sections.bound)
            packed = sum(len(pack_frame(payload, length)) for payload in payloads)
            chunks += packed / views + CRC_BYTES + ENTRY_BYTES
        arrays = [array for fitted in fit.values() for array in fitted.arrays().values()]
        fit_bytes = sum(
            len(compress(np.ascontiguousarray(a).tobytes(), ZSTD_LEVEL)) + ARRAY_BYTES
            for a in arrays
        )
        shared = (fit_bytes / self.images + self.row_bytes) / self.views
        return chunks + min(shared, self.target / 2)


def mean_image_bytes(source: ImageSource, samples: SampleList, view: ViewSpec) -> float:
    """Return the mean bytes of a stored image, from the first samples that can be decoded."""
    indices = [samples[row].index for row in range(min(SAMPLED_IMAGES, len(samples)))]
    decoded = [
        loaded
        for loaded in load_views(source, indices, view, threads=1)
        if loaded.pixels_CHW is not None
    ]
    total = sum(len(encode_stored(loaded, image_bound(view))) for loaded in decoded)
    return total / max(1, len(decoded))
