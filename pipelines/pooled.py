"""Images to vectors: pixels, a backbone's pooled features, the spatial means of a cache's taps. B images a batch."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dtcache.cache import Cache
from dtcache.codec import FeatureEncoder, HostDecoder
from dtcache.device import Compute
from dtcache.errors import ConfigError, ImagesError
from dtcache.images import ImageSource, LoadedView, load_views
from dtcache.options import EvaluateOptions, parse_size
from dtcache.payloads import pack
from dtcache.spec import Sample, ViewSpec
from dtcache.store.layout import MANIFEST
from dtcache.student import load_backbone, make_backbone, recalibrate_batch_norm, student_input
from dtcache.student.backbone import Backbone
from dtcache.student.folder import CONFIG
from pipelines.recipe import cache_teacher

PIXELS = "pixels"
PIXELS_SIZE = (32, 32)
ALL_TAPS = "all"
DECODE_THREADS = 2
CALIBRATION_BATCHES = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImages:
    """One side of an evaluation."""

    title: str
    source: ImageSource
    indices: list[int]
    """Places in the source's order, permuted."""


class Extractor(Protocol):
    """Turns images into named vectors."""

    view: ViewSpec
    """What it wants to see of an image."""

    def prepare(self, train: LabelledImages, test: LabelledImages) -> None:
        """Look at the images before any features are asked for."""

    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return pooled features (B, D) by name; the two lists run together."""


def open_model(model: str, options: EvaluateOptions, compute: Compute) -> Extractor:
    """Return the extractor of a model. Raises ConfigError where it is of no known kind, and what its parts raise."""
    size = parse_size(options.size) if options.size else None
    path = Path(model)
    if model == PIXELS:
        return PixelFeatures(*(size or PIXELS_SIZE))
    if (path / MANIFEST).is_file():
        return CacheFeatures(Cache(path), options.teacher, compute)
    if path.exists():
        if not (path / CONFIG).is_file():
            inner = [name for name in ("backbone", "init") if (path / name / CONFIG).is_file()]
            hint = f"; did you mean {path / inner[0]}?" if inner else ""
            raise ConfigError(f"{model}: expected a cache ({MANIFEST}) or a backbone folder ({CONFIG}){hint}")
        backbone, trained_size, view = load_backbone(path)
    else:
        backbone, view = make_backbone(model, init=None, seed=options.seed, size=size), None
        trained_size = backbone.default_size
    size = size or trained_size
    return NetworkFeatures(backbone, view or ViewSpec(height=size[0], width=size[1]), size, options.batch_size, compute)


def load_batches(images: LabelledImages, view: ViewSpec, size: int) -> Iterator[list[LoadedView]]:
    """Yield the images in order, decoded or failed, `size` at a time; the last batch may be short."""
    views = load_views(images.source, images.indices, view, threads=DECODE_THREADS)
    while batch := list(islice(views, size)):
        yield batch


def _stack(batch: Sequence[LoadedView]) -> Tensor:
    """Return uint8 pixels (B, 3, H, W)."""
    return torch.from_numpy(np.stack([v.pixels_CHW for v in batch if v.pixels_CHW is not None]))


class PixelFeatures:
    """The baseline that any network has to beat: the view's pixels themselves."""

    def __init__(self, height: int, width: int) -> None:
        self.view = ViewSpec(height=height, width=width)

    def prepare(self, train: LabelledImages, test: LabelledImages) -> None:
        """Do nothing."""

    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return pixels (B, 3 H W) in [0, 1], fp32."""
        return {PIXELS: _stack(batch).flatten(1).float() / 255}


class NetworkFeatures:
    """The spatial means of a backbone's coarsest map, at one input size."""

    def __init__(
        self, backbone: Backbone, view: ViewSpec, input_size: tuple[int, int], batch_size: int, compute: Compute
    ) -> None:
        self.view = view
        self._backbone = backbone.to(compute.device).to(memory_format=torch.channels_last).eval()
        self._input_size, self._batch_size, self._compute = input_size, batch_size, compute

    def prepare(self, train: LabelledImages, test: LabelledImages) -> None:
        """Calibrate batch normalisations that were never trained (a random network's, or a head's) on training images.

        With their initial statistics, 0 and 1, activations can grow or shrink from layer to layer.
        """
        batches = islice(load_batches(train, self.view, self._batch_size), CALIBRATION_BATCHES)
        good = ([v for v in batch if v.pixels_CHW is not None] for batch in batches)
        # A short last batch would weigh as much as a full one.
        full = (batch for i, batch in enumerate(good) if batch and (i == 0 or len(batch) == self._batch_size))
        with self._compute.autocast():
            recalibrate_batch_norm(self._backbone, map(self._input, full), self._backbone.fresh_batch_norms)

    @torch.inference_mode()
    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the pooled features (B, D), fp32."""
        with self._compute.autocast():
            return {self._backbone.name: self._backbone.pooled(self._input(batch)).float().cpu()}

    def _input(self, batch: Sequence[LoadedView]) -> Tensor:
        pixels_BCHW = _stack(batch).to(self._compute.device)
        x_BCHW = student_input(pixels_BCHW, self._input_size, self._backbone.mean, self._backbone.std)
        return x_BCHW.contiguous(memory_format=torch.channels_last)


class CacheFeatures:
    """Spatial means of a cache's decoded whitened features, view 0: read where cached, else computed by the teacher."""

    def __init__(self, cache: Cache, teacher: str | None, compute: Compute) -> None:
        """Index the cache by image content. Raises TeacherError where `teacher` is not the one of the cache."""
        self.view = cache.view
        self._cache, self._compute = cache, compute
        rows = cache.reader.usable_rows
        content = cache.reader.samples["content_sha256"].take(rows).to_pylist()
        self._row_of = dict(zip(content, rows.tolist(), strict=True))
        self._decoder = cache.decoder(cache.names).to(compute.device)
        device = str(compute.device)
        self._teacher = cache_teacher(cache.reader.root, cache.reader.manifest, teacher, device) if teacher else None
        self._tells_labels = cache.reader.manifest.recipe["teacher"].get("condition", {}).get("kind") == "label"
        self._encoder, self._host = FeatureEncoder(cache.fit, compute.device), HostDecoder(cache.fit)

    def prepare(self, train: LabelledImages, test: LabelledImages) -> None:
        """Raise ConfigError where images are not in the cache and no teacher is there to compute them.

        Raises ImagesError where the teacher is told labels, and these images have others.
        """
        if self._tells_labels:
            print(
                f"warning: the teacher of {self._cache.reader.root} was told each image's label; a probe may find it "
                "in the features",
                file=sys.stderr,
            )
        if self._teacher is not None:
            for images in (train, test):
                self._require_labels(images.source)
            return
        missing = total = 0
        for images in (train, test):
            for batch in load_batches(images, self.view, 256):
                good = [v for v in batch if v.pixels_CHW is not None]
                missing += sum(_content(v) not in self._row_of for v in good)
                total += len(good)
        if missing:
            raise ConfigError(
                f"{self._cache.reader.root}: {missing} of {total} images are not in the cache; give the cache's "
                "--teacher to compute their features, or images that were cached"
            )

    @torch.inference_mode()
    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return means (B, C) by array, and all of them side by side; NaN where the teacher's output is not finite."""
        names = self._cache.names
        pooled = {name: torch.full((len(batch), self._cache.shape(name)[0]), torch.nan) for name in names}
        row_of = [self._row_of.get(_content(loaded)) for loaded in batch]
        cached = [i for i, row in enumerate(row_of) if row is not None]
        if cached:
            rows = [row for row in row_of if row is not None]
            coefficients, _ = self._cache.coefficients(rows, [0] * len(rows), names)
            for name in names:
                pooled[name][cached] = self._pool(name, coefficients[name])
        missing = [i for i, row in enumerate(row_of) if row is None]
        step = self._teacher.spec.batch_size if self._teacher else len(batch)
        for start in range(0, len(missing), step):
            part = missing[start : start + step]
            draws = self._raw_draws([batch[i] for i in part], [samples[i] for i in part])
            for name in names:
                encoded = self._encoder.encode(name, *(raw[name] for raw in draws))
                good = [place for place, view in enumerate(encoded) if view.finite]
                if good:
                    values, _ = self._host.decode(name, pack([encoded[place].payload for place in good]))
                    pooled[name][[part[place] for place in good]] = self._pool(name, values)
        return {**pooled, ALL_TAPS: torch.cat(list(pooled.values()), 1)} if len(names) > 1 else pooled

    def _require_labels(self, source: ImageSource) -> None:
        assert self._teacher is not None, "asked where there is one"
        self._teacher.require_labels(source.keys, source.labels)
        cached = self._cache.reader.manifest.classes
        if self._tells_labels and cached and source.classes and list(cached) != source.classes:
            raise ImagesError(
                f"expected the classes of {self._cache.reader.root}, whose teacher is told them, got others; labels "
                "are places in the sorted class names, so both must have the same"
            )

    def _pool(self, name: str, coefficients_BN: Tensor) -> Tensor:
        decoded = self._decoder({name: coefficients_BN.to(self._compute.device)})
        return decoded[name].mean((2, 3)).cpu()  # type: ignore[no-any-return]

    def _raw_draws(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Return the teacher's raw features by array under the cache's recipe: draw 0, or all that it averages."""
        assert self._teacher is not None, "prepare() refuses images that neither cache nor teacher serve"
        recipe = self._cache.reader.manifest.recipe
        draws = range(recipe["draws"] if recipe["average"] else 1)
        inputs = [
            self._teacher.input(v.pixels_CHW, sample.key, False, seed=recipe["seed"], draws=draws, label=sample.label)
            for v, sample in zip(batch, samples, strict=True)
            if v.pixels_CHW is not None
        ]
        return list(self._teacher.features(self._teacher.batch(inputs)))


def _content(loaded: LoadedView) -> bytes:
    return hashlib.sha256(loaded.source).digest()
