"""Confusion counts and scores of predicted segmentation masks. C classes; scores in [0, 1]."""

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
"""(C, C) pixels by true class (row) and predicted class (column); counts can be added."""


def confusion_matrix(
    truth: NDArray[np.integer], predicted: NDArray[np.integer], classes: int, ignore: int
) -> Counts:
    """Return the counts of two masks of equal shape, without the pixels whose truth is `ignore`.

    At all other pixels both masks hold class numbers from 0 to `classes` - 1.
    """
    kept = truth != ignore
    pairs = truth[kept].astype(np.int64) * classes + predicted[kept]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def iou_per_class(counts: Counts) -> NDArray[np.float64]:
    """Return each class's intersection over union (C,); NaN for a class without a true pixel.

    |T and P| / |T or P| over all pixels, T true and P predicted pixels of the class (Everingham et
    al. 2015, The Pascal Visual Object Classes Challenge: A Retrospective).
    """
    hits = np.diag(counts)
    truth = counts.sum(1)
    predicted = counts.sum(0)
    return np.where(truth > 0, hits / np.maximum(truth + predicted - hits, 1), np.nan)


def mean_iou(counts: Counts) -> float:
    """Return the mean IoU over the classes that have true pixels; NaN if no class has any."""
    occurs = counts.sum(1) > 0
    return float(iou_per_class(counts)[occurs].mean()) if occurs.any() else float("nan")


def pixel_accuracy(counts: Counts) -> float:
    """Return the share of pixels that are classified correctly; NaN if there are no pixels."""
    return float(np.trace(counts) / counts.sum()) if counts.sum() else float("nan")
