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
    train = train.chosen(train.indices[: options.limit_train])
    if options.label_fraction is not None:
        train = balanced(train, options.label_fraction)
    return train, test.chosen(test.indices[: options.limit_test])


def balanced(images: EvaluatedImages, fraction: float) -> EvaluatedImages:
    """Return a fraction of the images with equally many per class, one at least.

    A smaller fraction of the same images is a subset. A class with fewer images gives all of them,
    which is reported on stderr.
    """
    labels = images.source.labels or []
    by_class: dict[int | None, list[int]] = {}
    for index in images.indices:
        by_class.setdefault(labels[index], []).append(index)
    per_class = max(1, round(fraction * len(images.indices) / max(1, len(by_class))))
    chosen = {index for of_class in by_class.values() for index in of_class[:per_class]}
    fewer = sum(len(of_class) < per_class for of_class in by_class.values())
    note = f"; {fewer} classes have fewer" if fewer else ""
    total = len(images.indices)
    say(f"{len(chosen)} of {total} {images.title} are used, {per_class} per class{note}")
    return images.chosen([index for index in images.indices if index in chosen])


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
