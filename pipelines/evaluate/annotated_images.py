"""Images with annotated objects: a training and a test set, in batches."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.class_names import absent_warning, class_difference
from dtcache.errors import ImagesError
from dtcache.images import LoadedView
from dtcache.images.coco import BoxFile, ViewObjects, read_boxes
from dtcache.images.decode import upright_size
from dtcache.names import shown
from dtcache.options import EvaluateOptions
from dtcache.recipe import ViewSpec
from pipelines.evaluate.image_split import EvaluatedImages, load_batches, split_images
from pipelines.terminal.open_images import open_images
from pipelines.terminal.output import say
from pipelines.terminal.progress import track

SURVEY_BATCH = 64
LISTED = 3
"""File names that a warning lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedBatch:
    """Images with their objects in the view."""

    loaded: list[LoadedView]
    """Decoded views; none of them failed."""
    objects: list[ViewObjects]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Indices (B,) of the images in their source."""
        return np.array([view.index for view in self.loaded], np.int64)

    def inputs(self) -> list[Tensor]:
        """Return the images (3, H, W) in [0, 1], fp32."""
        return [
            torch.from_numpy(view.pixels_CHW).float() / 255
            for view in self.loaded
            if view.pixels_CHW is not None
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedImages:
    """The training or the test set of a detection: every image can be decoded and is listed."""

    images: EvaluatedImages
    boxes: BoxFile
    masks: bool
    """Whether the masks of the objects are read too."""
    objects_K: NDArray[np.int64]
    """Objects per class in the view, without crowd regions."""

    def batches(self, view: ViewSpec, size: int) -> Iterator[AnnotatedBatch]:
        """Yield the images in order, `size` at a time; the last batch may be short."""
        keys = self.images.source.keys
        for batch in load_batches(self.images, view, size):
            decoded = [loaded for loaded in batch if loaded.pixels_CHW is not None]
            if decoded:
                yield AnnotatedBatch(
                    loaded=decoded,
                    objects=[
                        self.boxes.in_view(
                            keys[loaded.index],
                            view,
                            upright_size(loaded.source),
                            masks=self.masks,
                        )
                        for loaded in decoded
                    ],
                )

    def chosen(self, indices: list[int]) -> "AnnotatedImages":
        """Return the same set restricted to these indices; `objects_K` still counts all images."""
        return replace(self, images=self.images.chosen(indices))

    def identity(self) -> list[object]:
        """Return what identifies the images and their objects: keys, sizes, boxes and masks."""
        keys = [self.images.source.keys[index] for index in self.images.indices]
        listed = [self.boxes.images[key] for key in keys]
        return [
            [keys, self.boxes.names],
            [[o.boxes_N4.tolist(), o.classes_N.tolist(), o.crowd_N.tolist()] for o in listed],
            [o.shapes for o in listed] if self.masks else [],
        ]


def annotated_images(
    options: EvaluateOptions, view: ViewSpec
) -> tuple[AnnotatedImages, AnnotatedImages]:
    """Return the training and the test images that the COCO JSON lists, up to the limits.

    Images that it does not list, and images that cannot be decoded, are left out with a warning;
    listed images without an object are kept as negatives. Raises ConfigError for options that
    contradict each other, and ImagesError for unusable annotations, and if the classes of both sets
    differ.
    """
    train_path, test_path = options.require_annotations()
    train_boxes = read_boxes(train_path)
    test_boxes = train_boxes if test_path is None else read_boxes(test_path)
    test_boxes = _same_classes(train_boxes, test_boxes)
    train, test = split_images(options, open_images)
    found = [(train, train_boxes, options.limit_train), (test, test_boxes, options.limit_test)]
    for images, boxes, _ in found[: 1 if test_path is None else 2]:
        _warn_unknown(images, boxes)
    surveyed = [
        _surveyed(images, boxes, view, limit, options.masks) for images, boxes, limit in found
    ]
    return surveyed[0], surveyed[1]


def _same_classes(train: BoxFile, test: BoxFile) -> BoxFile:
    """Return the test objects with the class numbers of training. Raises ImagesError."""
    if set(test.names) != set(train.names):
        difference = class_difference(train.names, test.names)
        raise ImagesError(
            f"{test.path}: expected the categories of {train.path}, the first list, got others: "
            f"{difference}; use the same categories in both"
        )
    number_K = np.array([train.names.index(name) for name in test.names], np.int64)
    return replace(
        test,
        names=train.names,
        images={
            name: replace(objects, classes_N=number_K[objects.classes_N])
            for name, objects in test.images.items()
        },
    )


def _warn_unknown(images: EvaluatedImages, boxes: BoxFile) -> None:
    """Raise ImagesError if no image is listed; warn of names that are not among the images."""
    keys = set(images.source.keys)
    unknown = [name for name in boxes.images if name not in keys]
    if len(unknown) == len(boxes.images):
        first = images.source.keys[0] if images.source.keys else "an image"
        raise ImagesError(
            f"{boxes.path}: none of its {len(unknown)} file names is among the {images.title}; "
            f"expected names such as {shown(first)}, got {shown(unknown[0])}"
        )
    if unknown:
        names = ", ".join(map(shown, unknown[:LISTED])) + (", ..." if len(unknown) > LISTED else "")
        say(
            f"warning: {len(unknown)} of {len(boxes.images)} file names in {boxes.path} are not "
            f"among the {images.title}: {names}"
        )
    if boxes.num_empty:
        say(f"warning: {boxes.num_empty} boxes in {boxes.path} have no area and are left out")


def _surveyed(
    images: EvaluatedImages, boxes: BoxFile, view: ViewSpec, limit: int | None, masks: bool
) -> AnnotatedImages:
    """Read every image and its objects once before training, to find those that cannot be used."""
    keys = images.source.keys
    listed = [index for index in images.indices if keys[index] in boxes.images]
    _say_left_out(len(images.indices) - len(listed), images, f"are not listed in {boxes.path}")
    annotated = AnnotatedImages(
        images=images.chosen(listed[:limit]),
        boxes=boxes,
        masks=masks,
        objects_K=np.zeros(len(boxes.names), np.int64),
    )
    usable: list[int] = []
    num_negatives = 0
    num_crowds = 0
    with track(f"objects of {images.title}", len(annotated.images.indices)) as progress:
        for batch in annotated.batches(view, SURVEY_BATCH):
            usable += batch.rows.tolist()
            for objects in batch.objects:
                single_N = ~objects.crowd_N
                np.add.at(annotated.objects_K, objects.classes_N[single_N], 1)
                num_negatives += not single_N.any()
                num_crowds += int(objects.crowd_N.sum())
            progress.advance(len(batch.loaded))
    failed = len(annotated.images.indices) - len(usable)
    _say_left_out(failed, annotated.images, "cannot be decoded")
    if not annotated.objects_K.any():
        raise ImagesError(
            f"{boxes.path}: expected {images.title} with objects, got none in {len(usable)} images;"
            " pass other images"
        )
    absent = absent_warning(
        boxes.names,
        np.flatnonzero(annotated.objects_K).tolist(),
        -1,
        f"object in the {images.title}",
    )
    if absent and images.is_training:
        say(absent)
    if num_negatives:
        say(f"{num_negatives} of {len(usable)} {images.title} have no object: kept as negatives")
    if num_crowds:
        say(f"{num_crowds} crowd regions in the {images.title}: not learned, and ignored in scores")
    return annotated.chosen(usable)


def _say_left_out(count: int, images: EvaluatedImages, reason: str) -> None:
    if count:
        say(f"{count} of {len(images.indices)} {images.title} {reason} and are left out")
