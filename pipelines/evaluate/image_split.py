"""The images of an evaluation: a training and a test set, permuted, in batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.images import ImageSource, LoadedView, load_views
from dtcache.options import EvaluateOptions, ImagesOptions
from dtcache.recipe import ViewSpec
from dtcache.rng import permuted
from pipelines.terminal.output import say

DECODE_THREADS = 2
TRAINING = "training images"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedImages:
    """The training or the test images of an evaluation."""

    title: str
    """`training images` or `test images`, for messages."""
    source: ImageSource
    indices: list[int]
    """Indices into the source, permuted."""

    @property
    def is_training(self) -> bool:
        """Whether these are the training images."""
        return self.title == TRAINING

    def chosen(self, indices: list[int]) -> "EvaluatedImages":
        """Return the same set restricted to these indices."""
        return replace(self, indices=indices)


def split_images(
    options: EvaluateOptions, open_images: Callable[[Path, ImagesOptions], ImageSource]
) -> tuple[EvaluatedImages, EvaluatedImages]:
    """Return all training and all test images, opened by `open_images`, each permuted by the seed.

    If no test images are given, the last fifth of the permuted training images is held out. Raises
    ConfigError if no training images are given, and what `open_images` raises.
    """
    if not options.train or not str(options.train):
        raise ConfigError(
            "`train`: expected labelled training images (a folder tree of classes, or Parquet)"
        )
    train = open_images(options.train, options.reading)
    order = permuted(len(train.keys), seed=options.seed, stream="evaluate-train").tolist()
    if options.test is not None:
        test = open_images(options.test, options.test_reading)
        test_order = permuted(len(test.keys), seed=options.seed, stream="evaluate-test").tolist()
    else:
        held_out = len(order) // 5
        test = train
        test_order = order[len(order) - held_out :]
        order = order[: len(order) - held_out]
        say(
            f"no test images given: {held_out} of {len(train.keys)} training images are held out "
            "as test images"
        )
    return (
        EvaluatedImages(title=TRAINING, source=train, indices=order),
        EvaluatedImages(title="test images", source=test, indices=test_order),
    )


def load_batches(images: EvaluatedImages, view: ViewSpec, size: int) -> Iterator[list[LoadedView]]:
    """Yield the images in order, decoded or failed, in batches of `size`; the last may be short."""
    views = load_views(images.source, images.indices, view, threads=DECODE_THREADS)
    while batch := list(islice(views, size)):
        yield batch
