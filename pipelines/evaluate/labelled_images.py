"""Images with class labels: a training and a test set."""

from pathlib import Path

from dtcache.class_names import class_difference
from dtcache.errors import ImagesError
from dtcache.images import ImageSource
from dtcache.options import EvaluateOptions, ImagesOptions
from pipelines.evaluate.image_split import EvaluatedImages, split_images
from pipelines.terminal.open_images import open_images
from pipelines.terminal.output import say


def split_labelled(options: EvaluateOptions) -> tuple[EvaluatedImages, EvaluatedImages]:
    """Return the training and the test images of a classification, up to the limits.

    Raises ImagesError if labels are missing or if both sets have different class names.
    """
    train, test = split_images(options, _open_labelled)
    _require_same_classes(options, train.source, test.source)
    return (
        train.chosen(train.indices[: options.limit_train]),
        test.chosen(test.indices[: options.limit_test]),
    )


def _require_same_classes(options: EvaluateOptions, train: ImageSource, test: ImageSource) -> None:
    """Raise ImagesError if both name other classes; warn on stderr if only one names classes."""
    if train.classes and test.classes:
        difference = class_difference(train.classes, test.classes)
        if difference is not None:
            raise ImagesError(
                f"{options.test}: expected the classes of {options.train}, the first list, got "
                f"others: {difference}. Labels are numbers of these classes; use the same classes "
                "in both"
            )
    elif train.classes or test.classes:
        unnamed = options.test if train.classes else options.train
        named = options.train if train.classes else options.test
        say(
            f"warning: {unnamed} names no classes: its labels are taken as numbers of the classes "
            f"of {named} ({', '.join((train.classes or test.classes or [])[:5])}, ...)"
        )


def _open_labelled(path: Path, reading: ImagesOptions) -> ImageSource:
    source = open_images(path, reading)
    if source.labels is None or any(label is None or label < 0 for label in source.labels):
        raise ImagesError(
            f"{path}: expected a label for every image, got images without; pass a folder with one "
            "sub-folder per class, or Parquet with a column label: int (0 or more)"
        )
    return source
