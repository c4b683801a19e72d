"""Images with segmentation masks: a training and a test set, in batches.

B images of H x W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtcache.errors import ImagesError
from dtcache.images import LoadedView, MaskFolder, open_masks
from dtcache.images.decode import upright_size
from dtcache.images.masks import CLASSES_FILE
from dtcache.options import EvaluateOptions
from dtcache.recipe import Sample, ViewSpec
from pipelines.evaluate.image_split import EvaluatedImages, load_batches, split_images
from pipelines.terminal.open_images import open_images
from pipelines.terminal.output import say
from pipelines.terminal.progress import track

VALUES = 256
SURVEY_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedBatch:
    """Images with their masks."""

    loaded: list[LoadedView]
    """Decoded views; none of them failed."""
    samples: list[Sample]
    masks_BHW: NDArray[np.uint8]
    """Class numbers, or the ignore index."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """Indices (B,) of the images in their source."""
        return np.array([view.index for view in self.loaded], np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedImages:
    """The training or the test set of a segmentation: every image can be decoded and has a mask."""

    images: EvaluatedImages
    masks: MaskFolder
    pixels: NDArray[np.int64]
    """(256,): pixels per mask value at the size of the view; 0 for the ignore index."""

    def identity(self) -> list[object]:
        """Return what identifies the images and their masks: keys and pixels per value."""
        keys = self.images.source.keys
        return [[keys[index] for index in self.images.indices], self.pixels.tolist()]

    def batches(self, view: ViewSpec, size: int) -> Iterator[MaskedBatch]:
        """Yield the images in order, `size` at a time; the last batch may be short."""
        return _masked_batches(self.images, self.masks, view, size)

    def chosen(self, indices: list[int]) -> "MaskedImages":
        """Return the same set restricted to these indices; `pixels` still counts all images."""
        return replace(self, images=self.images.chosen(indices))


def masked_images(options: EvaluateOptions, view: ViewSpec) -> tuple[MaskedImages, MaskedImages]:
    """Return the training and the test images that have a mask, up to the limits.

    Images without a mask, and images that cannot be decoded, are left out with a warning. Raises
    ConfigError for options that contradict each other, and ImagesError if no image is left, if a
    mask is unusable or if the classes of both sets differ.
    """
    train_folder, test_folder = options.require_annotations()
    train_masks = open_masks(train_folder, options.ignore_index)
    test_masks = _test_masks(test_folder, options.ignore_index, train_masks)
    train, test = split_images(options, open_images)
    return (
        _surveyed(train, train_masks, view, options.limit_train),
        _surveyed(test, test_masks, view, options.limit_test),
    )


def _test_masks(folder: Path | None, ignore_index: int | None, train: MaskFolder) -> MaskFolder:
    if folder is None:
        return train
    test = open_masks(folder, ignore_index)
    if not (test.root / CLASSES_FILE).is_file():
        if train.names is not None:
            say(
                f"warning: {test.root} has no {CLASSES_FILE}: its values are taken as numbers of "
                f"the classes of {train.root}"
            )
        return replace(test, names=train.names, ignore=train.ignore)
    if (test.names, test.ignore) != (train.names, train.ignore):
        raise ImagesError(
            f"{test.root / CLASSES_FILE}: expected the classes and the ignored value of "
            f"{train.root}, got others; number the classes of both alike, or remove this file"
        )
    return test


def _surveyed(
    images: EvaluatedImages, masks: MaskFolder, view: ViewSpec, limit: int | None
) -> MaskedImages:
    """Read every image and mask once before training, to find those that cannot be used."""
    keys = images.source.keys
    masked = [index for index in images.indices if masks.has(keys[index])]
    if images.indices and not masked:
        first = keys[images.indices[0]]
        hint = masks.form_hint(keys[index] for index in images.indices)
        raise ImagesError(
            f"{masks.root}: no mask matches any of {len(images.indices)} {images.title}{hint}; "
            f"expected masks at the images' own relative paths, such as {masks.path(first)} for "
            f"{first}"
        )
    if len(masked) < len(images.indices):
        hint = masks.form_hint(keys[i] for i in images.indices if not masks.has(keys[i]))
        _warn_left_out(len(images.indices) - len(masked), images, f"have no mask{hint}")
    images = images.chosen(masked[:limit])
    usable: list[int] = []
    pixels = np.zeros(VALUES, np.int64)
    with track(f"masks of {images.title}", len(images.indices)) as progress:
        for batch in _masked_batches(images, masks, view, SURVEY_BATCH):
            usable += batch.rows.tolist()
            pixels += np.bincount(batch.masks_BHW.ravel(), minlength=VALUES)
            progress.advance(len(batch.loaded))
    if len(usable) < len(images.indices):
        _warn_left_out(len(images.indices) - len(usable), images, "cannot be decoded")
    pixels[masks.ignore] = 0
    if not pixels.any():
        raise ImagesError(
            f"{masks.root}: expected {images.title} with pixels of a class, got none in "
            f"{len(usable)} masks ({masks.ignore} is ignored); pass other images or another "
            "`ignore_index`"
        )
    return MaskedImages(images=images.chosen(usable), masks=masks, pixels=pixels)


def _warn_left_out(count: int, images: EvaluatedImages, reason: str) -> None:
    say(f"{count} of {len(images.indices)} {images.title} {reason} and are left out")


def _masked_batches(
    images: EvaluatedImages, masks: MaskFolder, view: ViewSpec, size: int
) -> Iterator[MaskedBatch]:
    keys = images.source.keys
    labels = images.source.labels
    for batch in load_batches(images, view, size):
        decoded = [loaded for loaded in batch if loaded.pixels_CHW is not None]
        if decoded:
            masks_HW = [
                masks.load(keys[loaded.index], view, upright_size(loaded.source))
                for loaded in decoded
            ]
            samples = [
                Sample(
                    index=loaded.index,
                    key=keys[loaded.index],
                    label=labels[loaded.index] if labels is not None else None,
                )
                for loaded in decoded
            ]
            yield MaskedBatch(loaded=decoded, samples=samples, masks_BHW=np.stack(masks_HW))
