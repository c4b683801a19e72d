"""Images with their segmentation masks: two sides of an evaluation, and batches of either. B images of H x W pixels."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dtcache.errors import ConfigError, ImagesError
from dtcache.images import LoadedView, MaskFolder, open_masks, open_source
from dtcache.images.decode import upright_size
from dtcache.images.masks import CLASSES_FILE
from dtcache.options import EvaluateOptions
from dtcache.recipe import Sample, ViewSpec
from pipelines.evaluate.image_split import EvaluatedImages, load_batches, split_images
from pipelines.terminal.progress import track

VALUES = 256
SURVEYED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedBatch:
    """Some images with their masks."""

    loaded: list[LoadedView]
    """None of them failed."""
    samples: list[Sample]
    masks_BHW: NDArray[np.uint8]
    """Class numbers, and the value that is ignored."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """Return the images' places (B,) in their source."""
        return np.array([view.index for view in self.loaded], np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedImages:
    """One side of an evaluation by segmentation: every image can be used and has a mask."""

    images: EvaluatedImages
    masks: MaskFolder
    pixels: NDArray[np.int64]
    """(256,): pixels of each value, as the view shows them; none of the one that is ignored."""

    def batches(self, view: ViewSpec, size: int) -> Iterator[MaskedBatch]:
        """Yield the images in order, `size` at a time; the last batch may be short."""
        return _masked_batches(self.images, self.masks, view, size)

    def chosen(self, indices: list[int]) -> "MaskedImages":
        """Return the same side with these images only; `pixels` stay those of all."""
        return replace(self, images=self.images.chosen(indices))


def masked_images(options: EvaluateOptions, view: ViewSpec) -> tuple[MaskedImages, MaskedImages]:
    """Return the training and the test images that have a mask, as many as the limits allow.

    Those without, and those that cannot be decoded, are left out with a warning. Raises ConfigError for options that
    do not go together, ImagesError where none is left, for masks that do not fit and for classes that differ.
    """
    if options.train_masks is None or (options.test is None) != (options.test_masks is None):
        lacking = "--train-masks" if options.train_masks is None else "--test-masks with --test"
        raise ConfigError(
            f"--task segmentation: expected {lacking}, a folder of masks, and --test with --test-masks"
        )
    train_masks = open_masks(options.train_masks, options.ignore)
    test_masks = _test_masks(options, train_masks)
    train, test = split_images(options, lambda path: open_source(path, track))
    return (
        _surveyed(train, train_masks, view, options.limit_train),
        _surveyed(test, test_masks, view, options.limit_test),
    )


def _test_masks(options: EvaluateOptions, train: MaskFolder) -> MaskFolder:
    if options.test_masks is None:
        return train
    test = open_masks(options.test_masks, options.ignore)
    if not (test.root / CLASSES_FILE).is_file():
        return replace(test, names=train.names, ignore=train.ignore)
    if (test.names, test.ignore) != (train.names, train.ignore):
        raise ImagesError(
            f"{test.root / CLASSES_FILE}: expected the classes and the ignored value of {train.root}, got others; "
            "number the classes of both alike, or leave this file out"
        )
    return test


def _surveyed(
    images: EvaluatedImages, masks: MaskFolder, view: ViewSpec, limit: int | None
) -> MaskedImages:
    """Look at every image and mask once, before any training: what cannot be used is known then."""
    keys = images.source.keys
    masked = [index for index in images.indices if masks.has(keys[index])]
    if images.indices and not masked:
        first = keys[images.indices[0]]
        raise ImagesError(
            f"{masks.root}: no mask matches any of {len(images.indices)} {images.title}; expected masks at the images' "
            f"own relative paths, such as {masks.path(first)} for {first}"
        )
    if len(masked) < len(images.indices):
        lost = len(images.indices) - len(masked)
        print(
            f"{lost} of {len(images.indices)} {images.title} have no mask and are left out",
            file=sys.stderr,
        )
    images = images.chosen(masked[:limit])
    usable: list[int] = []
    pixels = np.zeros(VALUES, np.int64)
    with track(f"masks of {images.title}", len(images.indices)) as progress:
        for batch in _masked_batches(images, masks, view, SURVEYED_AT_ONCE):
            usable += batch.rows.tolist()
            pixels += np.bincount(batch.masks_BHW.ravel(), minlength=VALUES)
            progress.advance(len(batch.loaded))
    failed = len(images.indices) - len(usable)
    if failed:
        print(
            f"{failed} of {len(images.indices)} {images.title} cannot be decoded and are left out",
            file=sys.stderr,
        )
    pixels[masks.ignore] = 0
    if not pixels.any():
        raise ImagesError(
            f"{masks.root}: expected {images.title} with pixels of a class, got none in {len(usable)} masks "
            f"({masks.ignore} is ignored); give other images or another --ignore"
        )
    return MaskedImages(images=images.chosen(usable), masks=masks, pixels=pixels)


def _masked_batches(
    images: EvaluatedImages, masks: MaskFolder, view: ViewSpec, size: int
) -> Iterator[MaskedBatch]:
    keys = images.source.keys
    labels = images.source.labels
    for batch in load_batches(images, view, size):
        good = [loaded for loaded in batch if loaded.pixels_CHW is not None]
        if good:
            shown = [
                masks.load(keys[loaded.index], view, upright_size(loaded.source)) for loaded in good
            ]
            samples = [
                Sample(
                    index=v.index,
                    key=keys[v.index],
                    label=labels[v.index] if labels is not None else None,
                )
                for v in good
            ]
            yield MaskedBatch(loaded=good, samples=samples, masks_BHW=np.stack(shown))
