"""Segmentation scores equal scikit-learn's, with ignored pixels and absent classes."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, jaccard_score
from sklearn.metrics import confusion_matrix as reference

from dtcache.metrics.segmentation import confusion_matrix, iou_per_class, mean_iou, pixel_accuracy

RNG = np.random.default_rng(0)


def test_counts_and_scores_are_scikit_learns() -> None:
    """Counts, IoU, mIoU and accuracy equal scikit-learn's when counts are added over batches."""
    truth = RNG.integers(0, 5, (4, 30, 20)).astype(np.uint8)
    predicted = np.where(
        RNG.random(truth.shape) < 0.6, truth, RNG.integers(0, 5, truth.shape)
    ).astype(np.uint8)
    counts = sum(confusion_matrix(t, p, 5, 255) for t, p in zip(truth, predicted, strict=True))
    flat = truth.ravel(), predicted.ravel()
    assert np.array_equal(counts, reference(*flat))
    assert iou_per_class(counts) == pytest.approx(jaccard_score(*flat, average=None))
    assert mean_iou(counts) == pytest.approx(jaccard_score(*flat, average="macro"))
    assert pixel_accuracy(counts) == pytest.approx(accuracy_score(*flat))


@pytest.mark.parametrize("ignore", [255, 0])
def test_ignored_pixels_count_nowhere(ignore: int) -> None:
    """Predictions at ignored pixels change no score, even if the ignore index is a class number."""
    truth = RNG.integers(1, 4, (50, 50)).astype(np.uint8)
    predicted = RNG.integers(0, 4, (50, 50))
    hidden = RNG.random(truth.shape) < 0.3
    masked = np.where(hidden, ignore, truth).astype(np.uint8)
    counts = confusion_matrix(masked, predicted, 4, ignore)
    assert np.array_equal(counts, reference(truth[~hidden], predicted[~hidden], labels=range(4)))


def test_classes_without_true_pixels_leave_the_mean() -> None:
    """A class without true pixels has no IoU; predicting it lowers the IoU of the true class."""
    truth = np.array([0, 0, 0, 0, 1, 1], np.uint8)
    counts = confusion_matrix(truth, np.array([0, 0, 0, 2, 1, 1]), 3, 255)
    assert iou_per_class(counts) == pytest.approx([3 / 4, 1, np.nan], nan_ok=True)
    assert mean_iou(counts) == pytest.approx(7 / 8)
    nothing = confusion_matrix(np.full(4, 255), np.zeros(4, np.int64), 3, 255)
    assert np.isnan(mean_iou(nothing)) and np.isnan(pixel_accuracy(nothing))
