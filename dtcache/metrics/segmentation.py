"""Counts and scores of predicted segmentation masks. C classes; shares are from 0 to 1."""

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
"""(C, C) pixels: a row for the true class, a column for the predicted one; counts of several masks add up."""


def confusion_matrix(
    truth: NDArray[np.integer], predicted: NDArray[np.integer], classes: int, ignore: int
) -> Counts:
    """Return the counts of masks of any, equal shape; pixels whose truth is `ignore` count nowhere.

    Both hold classes from 0 to `classes` - 1 wherever the truth is not `ignore`.
    """
    kept = truth != ignore
    pairs = truth[kept].astype(np.int64) * classes + predicted[kept]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def iou_per_class(counts: Counts) -> NDArray[np.float64]:
    """Return each class's intersection over union (C,); NaN for a class without a true pixel.

    |T and P| / |T or P| of all pixels together (Everingham et al. 2015, The Pascal Visual Object Classes Challenge).
    """
    hits = np.diag(counts)
    truth = counts.sum(1)
    predicted = counts.sum(0)
    return np.where(truth > 0, hits / np.maximum(truth + predicted - hits, 1), np.nan)


def mean_iou(counts: Counts) -> float:
    """Return the mean IoU over the classes that have true pixels; NaN where there are none."""
    occurs = counts.sum(1) > 0
    return float(iou_per_class(counts)[occurs].mean()) if occurs.any() else float("nan")


def pixel_accuracy(counts: Counts) -> float:
    """Return the share of pixels whose class is predicted rightly; NaN where there are none."""
    return float(np.trace(counts) / counts.sum()) if counts.sum() else float("nan")
