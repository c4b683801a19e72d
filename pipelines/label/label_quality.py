"""What a finished label set is worth: its error against exact logits, how sure it is, how far known labels agree."""

from collections.abc import Callable
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from dtcache.cache.batch import Rows
from dtcache.cache.cache import Cache
from dtcache.cache.label_set import LabelSet
from dtcache.class_names import alike
from dtcache.errors import ConfigError, ImagesError
from dtcache.labels import InterpreterSpec
from dtcache.losses.labels import TEMPERATURE, entropy, total_variation
from dtcache.metrics.segmentation import confusion_matrix, mean_iou, pixel_accuracy
from dtcache.options import LabelWriteOptions
from dtcache.recipe import Json
from dtcache.student.blocks import resize
from pipelines.label.labelled_rows import Labelled, images_with_masks, labelled_images
from pipelines.terminal.progress import track

SAMPLED = 256
"""Images that errors and entropies are measured on, the last ones: mostly such that the codec was not fitted on."""
COMPARED = 4096
"""Masks at most that stored labels are compared with: they are in memory at once."""
AT_ONCE = 32


def measure(
    cache: Cache, labels: LabelSet, exact: Callable[[Rows], Tensor], known: Labelled | None
) -> Json:
    """Return `images`, `temperature`, `total_variation`, `entropy` in bits, and `agreement` with known labels.

    Stored logits are read back from the disk. The agreement is None where nothing is known; else it has `images`,
    `miou` (None of image labels) and `accuracy`, of views that are not mirrored.
    """
    rows = cache.reader.usable_rows[-SAMPLED:]
    errors = []
    entropies = []
    with track("label measure", len(rows)) as progress:
        for start in range(0, len(rows), AT_ONCE):
            chosen = rows[start : start + AT_ONCE]
            stored = labels.logits(chosen).flatten(0, 1)
            errors += total_variation(stored, exact(chosen).flatten(0, 1)).mean((1, 2)).tolist()
            entropies += entropy(stored).mean((1, 2)).tolist()
            progress.advance(len(chosen))
    return {
        "images": len(rows),
        "temperature": TEMPERATURE,
        "total_variation": fmean(errors),
        "entropy": fmean(entropies),
        "agreement": agreement(labels, known) if known is not None else None,
    }


def known_labels(
    cache: Cache, spec: InterpreterSpec, options: LabelWriteOptions
) -> Labelled | None:
    """Return the masks that the options give, or the labels of some images; None where there are none of its classes.

    Raises ConfigError for masks beside an interpreter of whole images, ImagesError for masks that do not serve or whose
    numbers stand for other classes.
    """
    if spec.level == "image":
        if options.masks is not None:
            raise ConfigError(
                "--masks: the interpreter labels whole images; leave --masks and --ignore out"
            )
        if not any(label is not None for label in cache.samples["label"].to_pylist()):
            return None
        known = labelled_images(cache, SAMPLED)
        return known if alike(known.classes, spec.classes) else None
    if options.masks is None:
        if options.images is not None:
            raise ConfigError(
                "--images: expected beside --masks, whose sizes they give; leave it out"
            )
        return None
    known = images_with_masks(cache, options.masks, options.ignore, COMPARED, options.images)
    if not alike(known.classes, spec.classes):
        raise ImagesError(
            f"{options.masks}: expected the interpreter's classes, {', '.join(spec.classes)[:200]}, got "
            f"{', '.join(known.classes)[:200]}; number the classes alike, or leave --masks out"
        )
    return known


def agreement(labels: LabelSet, known: Labelled) -> Json:
    """Return how far stored labels of unmirrored views agree with known ones: `images`, `miou` and `accuracy`."""
    classes = max(len(labels.classes), len(known.classes))
    counts = np.zeros((classes, classes), np.int64)
    for start in range(0, len(known), AT_ONCE):
        part = known.part(range(start, min(start + AT_ONCE, len(known))))
        with torch.no_grad():
            logits = resize(labels.logits(part.rows)[:, 0], part.truth_NHW.shape[1:])
        counts += confusion_matrix(
            part.truth_NHW.numpy(), logits.argmax(1).numpy(), classes, part.ignore
        )
    miou = mean_iou(counts) if labels.about["level"] == "pixel" else None
    found = {"miou": miou, "accuracy": pixel_accuracy(counts)}
    return {
        "images": len(known),
        **{name: None if value != value else value for name, value in found.items()},
    }
