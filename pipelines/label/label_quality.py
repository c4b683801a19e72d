"""Quality of a label set: distance from exact logits, entropy, agreement with known labels."""

import math
from collections.abc import Callable
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from dtcache.cache.batch import Rows
from dtcache.cache.cache import Cache
from dtcache.cache.label_set import LabelSet
from dtcache.class_names import same_classes
from dtcache.errors import ConfigError, ImagesError
from dtcache.labels import InterpreterSpec
from dtcache.losses.labels import TEMPERATURE, entropy, total_variation
from dtcache.metrics.segmentation import Counts, confusion_matrix, mean_iou, pixel_accuracy
from dtcache.options import LabelWriteOptions
from dtcache.recipe import Json
from dtcache.student.blocks import resize
from pipelines.label.labelled_rows import LabelledRows, images_with_masks, labelled_images
from pipelines.terminal.progress import track

SAMPLED = 256
"""Images on which errors and entropies are measured: the last rows.

The codec is fitted on the first ones.
"""
COMPARED = 4096
"""Most masks that stored labels are compared with; they are in memory together."""
AT_ONCE = 32


def measure(
    cache: Cache, labels: LabelSet, exact: Callable[[Rows], Tensor], known: LabelledRows | None
) -> Json:
    """Return `images`, `temperature`, `total_variation`, `entropy` in bits, and `agreement`.

    `exact` returns exact logits (B, V, K, H, W) of rows; stored logits are read back from the disk.
    `agreement` is what `agreement()` returns, or None if `known` is None.
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
) -> LabelledRows | None:
    """Return known labels to compare the stored ones with, or None if there are none.

    They are the masks in `options.masks`; for an interpreter of whole images, up to 256 labels of
    the cache's index if their classes are the interpreter's. Raises ConfigError for masks with an
    interpreter of whole images or images without masks, and ImagesError for unusable masks or masks
    of other classes.
    """
    if spec.level == "image":
        if options.masks is not None:
            raise ConfigError(
                "`masks`: the interpreter labels whole images; leave `masks` and `ignore_index` out"
            )
        if not any(label is not None for label in cache.samples["label"].to_pylist()):
            return None
        known = labelled_images(cache, SAMPLED)
        return known if same_classes(known.classes, spec.classes) else None
    if options.masks is None:
        if options.images is not None:
            raise ConfigError(
                "`images`: expected together with `masks`, whose sizes they check; leave it out"
            )
        return None
    known = images_with_masks(
        cache, options.masks, options.ignore_index, COMPARED, options.images, options.reading
    )
    if not same_classes(known.classes, spec.classes):
        raise ImagesError(
            f"{options.masks}: expected the interpreter's classes, "
            f"{', '.join(spec.classes)[:200]}, got {', '.join(known.classes)[:200]}; "
            "number the classes alike, or leave `masks` out"
        )
    return known


def agreement(labels: LabelSet, known: LabelledRows) -> Json:
    """Return `label_scores` of the stored labels of unmirrored views against known labels."""
    num_classes = max(len(labels.classes), len(known.classes))
    counts = np.zeros((num_classes, num_classes), np.int64)
    for start in range(0, len(known), AT_ONCE):
        batch = known.take(range(start, min(start + AT_ONCE, len(known))))
        with torch.no_grad():
            logits = resize(labels.logits(batch.rows)[:, 0], batch.truth_NHW.shape[1:])
        counts += confusion_matrix(
            batch.truth_NHW.numpy(), logits.argmax(1).numpy(), num_classes, batch.ignore
        )
    return label_scores(counts, len(known), labels.about["level"])


def label_scores(counts: Counts, num_images: int, level: str) -> Json:
    """Return `images`, `miou` (None for image labels) and `accuracy`, as shares.

    A score is None if every label is ignored: JSON has no NaN.
    """
    scores = {
        "miou": mean_iou(counts) if level == "pixel" else None,
        "accuracy": pixel_accuracy(counts),
    }
    return {
        "images": num_images,
        **{n: None if v is None or math.isnan(v) else v for n, v in scores.items()},
    }
