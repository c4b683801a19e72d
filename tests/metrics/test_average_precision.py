"""Average precision: a set whose value is computed by hand."""

import pytest
import torch

from dtcache.metrics.detection import AveragePrecision

pytest.importorskip("faster_coco_eval")


def boxes(*corners: tuple[float, ...]) -> torch.Tensor:
    """Return boxes (N, 4)."""
    return torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)


def rectangles(boxes_N4: torch.Tensor, size: int = 64) -> torch.Tensor:
    """Return the filled boxes as masks, bool (N, size, size)."""
    masks = torch.zeros(len(boxes_N4), size, size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes_N4.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def hand_made(masks: bool) -> AveragePrecision:
    """Return a metric of two images.

    Class 0 has two objects of 10 x 10. Its predictions by falling score: one of IoU 1 (a hit at all
    ten thresholds), one of IoU 0 (a miss), and one of 9 x 9 inside the second object, IoU 0.81 (a
    hit up to 0.80, at seven thresholds). Class 1 has one object of 40 x 40, which is not predicted,
    and class 2 none. A crowd region of class 0 takes up a fourth prediction.
    """
    metric = AveragePrecision(3, masks=masks)
    first = boxes((0, 0, 10, 10), (20, 20, 60, 60))
    second = boxes((0, 0, 10, 10), (30, 0, 60, 30))
    predicted = [boxes((0, 0, 10, 10), (50, 0, 60, 10)), boxes((0, 0, 9, 9), (32, 2, 42, 12))]
    scores = [torch.tensor([0.9, 0.8]), torch.tensor([0.7, 0.95])]
    labels = [torch.tensor([0, 1]), torch.tensor([0, 0])]
    truth = [
        {"boxes": b, "labels": of_boxes, "iscrowd": crowd}
        for b, of_boxes, crowd in zip(
            (first, second), labels, (torch.tensor([0, 0]), torch.tensor([0, 1])), strict=True
        )
    ]
    found = [
        {"boxes": b, "scores": s, "labels": torch.zeros(2, dtype=torch.long)}
        for b, s in zip(predicted, scores, strict=True)
    ]
    if masks:
        for image in (*truth, *found):
            image["masks"] = rectangles(image["boxes"])
    metric.add(found, truth)
    return metric


@pytest.mark.parametrize("masks", [False, True])
def test_average_precision_is_the_one_computed_by_hand(masks: bool) -> None:
    """AP is the mean over 101 recalls of the best precision at that recall or a higher one.

    Up to IoU 0.80, the recall of class 0 is 0.5 at precision 1 and 1 at precision 2/3: 51 recalls
    from 0 to 0.50 have precision 1, and 50 have 2/3. Above, recall ends at 0.5: 51 of 101.
    """
    precision, of_masks = hand_made(masks).compute()
    low = (51 + 50 * 2 / 3) / 101
    high = 51 / 101
    class_0 = 100 * (7 * low + 3 * high) / 10
    for result in (precision, *([of_masks] if of_masks is not None else [])):
        assert result.per_class[0] == pytest.approx(class_0, abs=1e-4)
        assert result.per_class[1] == pytest.approx(0)
        assert result.per_class[2] is None
        assert result.ap == pytest.approx(class_0 / 2, abs=1e-4)
        assert result.ap50 == pytest.approx(100 * low / 2, abs=1e-4)
        assert result.ap75 == pytest.approx(100 * low / 2, abs=1e-4)
        assert result.small == pytest.approx(class_0, abs=1e-4)
        assert result.medium == pytest.approx(0)
        assert result.large is None
    assert (of_masks is not None) == masks


def test_images_without_objects_count_their_false_detections() -> None:
    """A detection in an empty image lowers the precision, and an empty prediction does nothing."""
    metric = AveragePrecision(1, masks=False)
    box = boxes((0, 0, 10, 10))
    none = {"boxes": boxes(), "labels": torch.zeros(0, dtype=torch.long)}
    label = torch.zeros(1, dtype=torch.long)
    metric.add(
        [
            {"boxes": box, "scores": torch.tensor([0.9]), "labels": label},
            {"boxes": box, "scores": torch.tensor([0.8]), "labels": label},
            {**none, "scores": torch.zeros(0)},
        ],
        [
            {**none, "iscrowd": torch.zeros(0, dtype=torch.long)},
            {"boxes": box, "labels": label, "iscrowd": torch.zeros(1, dtype=torch.long)},
            {**none, "iscrowd": torch.zeros(0, dtype=torch.long)},
        ],
    )
    precision, _ = metric.compute()
    assert precision.ap == pytest.approx(50, abs=1e-4)
