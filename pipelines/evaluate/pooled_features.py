"""One vector per image: its pixels, a backbone's pooled features, or the means of a cache's taps.

B images per batch, D values per vector.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.arguments import is_address
from dtcache.cache.cache import Cache
from dtcache.device import Compute
from dtcache.errors import ConfigError, ImagesError
from dtcache.images import ImageSource, LoadedView
from dtcache.metrics.probes import Features, Labels
from dtcache.options import EvaluateOptions, parse_size
from dtcache.recipe import Sample, ViewSpec
from dtcache.store.layout import MANIFEST
from dtcache.store.remote import Location, location_of
from dtcache.student import (
    fresh_batch_norms,
    load_backbone,
    make_backbone,
    recalibrate_batch_norm,
    student_input,
)
from dtcache.student.backbone import Backbone
from dtcache.student.timm_backbone import weights_tag
from dtcache.student.weights_io import CONFIG
from pipelines.evaluate.cache_features import CachedMaps
from pipelines.evaluate.image_split import EvaluatedImages, load_batches
from pipelines.terminal.output import say
from pipelines.terminal.progress import track

PIXELS = "pixels"
PIXELS_SIZE = (32, 32)
ALL_TAPS = "all"
BATCH_SIZE = 128
CALIBRATION_BATCHES = 32


class Extractor(Protocol):
    """Turns images into named vectors."""

    view: ViewSpec
    """View of the images."""

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Prepare for these images; called once, before any features are computed."""

    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return pooled features (B, D) by name, fp32; `batch` and `samples` are parallel lists."""


def open_model(model: str, options: EvaluateOptions, compute: Compute) -> Extractor:
    """Return the extractor of `pixels`, a cache, a backbone folder or a timm name.

    Raises ConfigError if `model` is none of these, and what opening it raises.
    """
    if model == PIXELS:
        return PixelFeatures(*(parse_size(options.size) if options.size else PIXELS_SIZE))
    if (cache := cache_location(model)) is not None:
        return CacheFeatures(Cache(cache), options.teacher, compute)
    return NetworkFeatures(open_backbone(model, options), options.batch_size or BATCH_SIZE, compute)


def cache_location(model: str) -> Location | None:
    """Return where the cache is that `model` names by its path or address; None for no cache."""
    if is_address(model) or (Path(model) / MANIFEST).is_file():
        return location_of("model", model)
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedBackbone:
    """A backbone to be evaluated."""

    name: str
    """Its network; for a timm name also the tag of its weights, or that they are random."""
    backbone: Backbone
    view: ViewSpec
    input_size: tuple[int, int]
    """(height, width) in pixels."""


def open_backbone(model: str, options: EvaluateOptions) -> EvaluatedBackbone:
    """Return the backbone of a folder or of a timm name.

    As in timm, a name with a tag means the pretrained weights of that tag; a name without one means
    random weights. Raises ConfigError if `model` is neither, or does not take the size.
    """
    size = parse_size(options.size) if options.size else None
    path = Path(model)
    if path.exists():
        if not (path / CONFIG).is_file():
            inner = [name for name in ("backbone", "init") if (path / name / CONFIG).is_file()]
            hint = f"; did you mean {path / inner[0]}?" if inner else ""
            raise ConfigError(
                f"{model}: expected a cache ({MANIFEST}) or a backbone folder ({CONFIG}){hint}"
            )
        backbone, trained_size, view = load_backbone(path, size)
        name = backbone.name
    else:
        tag = weights_tag(model)
        init = "pretrained" if tag else None
        backbone = make_backbone(model, init=init, seed=options.seed, size=size)
        view = None
        trained_size = backbone.default_size
        name = model if tag else f"{model} (random weights)"
    size = size or trained_size
    backbone.require_size(size, "size")
    return EvaluatedBackbone(
        name=name,
        backbone=backbone,
        view=view or ViewSpec(height=size[0], width=size[1]),
        input_size=size,
    )


def open_network(model: str, options: EvaluateOptions) -> EvaluatedBackbone:
    """Return a backbone whose view is its input, for tasks that locate objects or train it.

    Raises ConfigError if `model` is a cache or the word pixels, and what `open_backbone` raises.
    """
    if model == PIXELS or (Path(model) / MANIFEST).is_file():
        training = " with `finetune=True`" if options.task == "classification" else ""
        raise ConfigError(
            f"{model}: expected a backbone folder or a timm name, as `task='{options.task}'`"
            f"{training} trains on a network's maps"
        )
    evaluated = open_backbone(model, options)
    height, width = evaluated.input_size
    view = ViewSpec(height=height, width=width, resize_mode=evaluated.view.resize_mode)
    return replace(evaluated, view=view)


def stack_pixels(batch: Sequence[LoadedView]) -> Tensor:
    """Return pixels, uint8 (B, 3, H, W), of the views that did not fail."""
    return torch.from_numpy(np.stack([v.pixels_CHW for v in batch if v.pixels_CHW is not None]))


class PixelFeatures:
    """Baseline: the pixels of the view."""

    def __init__(self, height: int, width: int) -> None:
        self.view = ViewSpec(height=height, width=width)

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Do nothing: pixels need no preparation."""

    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return pixels (B, 3 H W) in [0, 1], fp32."""
        return {PIXELS: stack_pixels(batch).flatten(1).float() / 255}


class NetworkFeatures:
    """Spatial means of a backbone's coarsest map, at one input size."""

    def __init__(self, evaluated: EvaluatedBackbone, batch_size: int, compute: Compute) -> None:
        self.name = evaluated.name
        self.view = evaluated.view
        self.backbone = (
            evaluated.backbone.to(compute.device).to(memory_format=torch.channels_last).eval()
        )
        self.input_size = evaluated.input_size
        self._batch_size = batch_size
        self._compute = compute

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Estimate the statistics of batch norms that were never trained, on training images.

        With the initial statistics, 0 and 1, activations can grow or shrink from layer to layer.
        """
        batches = islice(load_batches(train, self.view, self._batch_size), CALIBRATION_BATCHES)
        decoded = ([v for v in batch if v.pixels_CHW is not None] for batch in batches)
        # A short last batch would weigh as much as a full one.
        full = (
            batch
            for i, batch in enumerate(decoded)
            if batch and (i == 0 or len(batch) == self._batch_size)
        )
        with self._compute.autocast():
            recalibrate_batch_norm(
                self.backbone, map(self._input, full), fresh_batch_norms(self.backbone)
            )

    @torch.inference_mode()
    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the pooled features (B, D), fp32."""
        with self._compute.autocast():
            return {self.name: self.backbone.pooled(self._input(batch)).float().cpu()}

    def normalised(self, images_BCHW: Tensor) -> Tensor:
        """Return the backbone's input for images (B, 3, H, W) in 0..255: resized and normalised."""
        x_BCHW = student_input(
            images_BCHW.to(self._compute.device),
            self.input_size,
            self.backbone.mean,
            self.backbone.std,
        )
        return x_BCHW.contiguous(memory_format=torch.channels_last)

    def _input(self, batch: Sequence[LoadedView]) -> Tensor:
        return self.normalised(stack_pixels(batch))


class CacheFeatures:
    """Spatial means of a cache's decoded whitened features, view 0."""

    def __init__(self, cache: Cache, teacher: str | None, compute: Compute) -> None:
        """Index the cache by image content. Raises ConfigError if `teacher` is not the cache's."""
        self.view = cache.view
        self.maps = CachedMaps(cache, teacher, compute)

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Raise what `CachedMaps.require` raises."""
        self.maps.require(train, test)

    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return means (B, C) by array, and under `all` their concatenation.

        Means are NaN if the teacher's output is not finite.
        """
        pooled = self.maps(batch, samples, lambda x_BCHW: x_BCHW.mean((2, 3)).cpu())
        return (
            {**pooled, ALL_TAPS: torch.cat(list(pooled.values()), 1)} if len(pooled) > 1 else pooled
        )


def pooled_features(
    extractor: Extractor, images: EvaluatedImages, batch_size: int
) -> tuple[dict[str, Features], Labels]:
    """Return features (N, D) by name, fp32, and labels (N,), int64.

    Images that cannot be decoded, or whose features are not finite, are left out with a warning.
    Raises ImagesError if none is left.
    """
    vectors: dict[str, list[Features]] = defaultdict(list)
    labels = []
    reasons = []
    with track(images.title, len(images.indices)) as progress:
        for batch in load_batches(images, extractor.view, batch_size):
            decoded = [loaded for loaded in batch if loaded.pixels_CHW is not None]
            reasons += [str(loaded.failure) for loaded in batch if loaded.pixels_CHW is None]
            if decoded:
                labels_B, samples = _samples(images.source, decoded)
                by_name = extractor(decoded, samples)
                finite_B = _finite(by_name)
                reasons += ["features that are not finite"] * int((~finite_B).sum())
                for name, x_BD in by_name.items():
                    vectors[name].append(x_BD.numpy()[finite_B])
                labels.append(labels_B[finite_B])
            progress.advance(len(batch))
    if reasons:
        say(f"{len(reasons)} of {len(images.indices)} {images.title} left out ({reasons[0]})")
    if len(reasons) == len(images.indices):
        cause = f"; all failed ({reasons[0]})" if reasons else ""
        raise ImagesError(
            f"expected {images.title} that can be used, got none{cause}; pass other images"
        )
    return {name: np.concatenate(parts) for name, parts in vectors.items()}, np.concatenate(labels)


def _samples(source: ImageSource, batch: list[LoadedView]) -> tuple[Labels, list[Sample]]:
    """Return the labels (B,) of a batch and its samples. The source has a label for every image."""
    labels = [(source.labels or [])[loaded.index] for loaded in batch]
    samples = [
        Sample(index=loaded.index, key=source.keys[loaded.index], label=label)
        for loaded, label in zip(batch, labels, strict=True)
    ]
    return np.array(labels, np.int64), samples


def _finite(by_name: dict[str, Tensor]) -> NDArray[np.bool_]:
    """Return which images (B,) have finite features of every name."""
    finite_B = torch.stack([x_BD.isfinite().all(1) for x_BD in by_name.values()]).all(0)
    return np.asarray(finite_B.numpy(), np.bool_)
