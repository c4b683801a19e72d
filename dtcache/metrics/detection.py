"""Average precision of boxes and masks, by COCO's protocol.

N objects or predictions of an image; boxes are (x0, y0, x1, y1) in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from dtcache.errors import ConfigError, one_line


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Average precision, per cent; None without a test object of that size or class."""

    ap: float | None
    """Mean over the classes and over IoU thresholds from 0.50 to 0.95 in steps of 0.05."""
    ap50: float | None
    ap75: float | None
    small: float | None
    """Of objects under 32 x 32 pixels."""
    medium: float | None
    large: float | None
    """Of objects of 96 x 96 pixels or more."""
    per_class: tuple[float | None, ...]
    """By class number."""


class AveragePrecision:
    """Collects predictions and objects, image by image, and computes their average precision."""

    def __init__(self, num_classes: int, *, masks: bool) -> None:
        """Raise ConfigError if torchmetrics or faster-coco-eval is not installed."""
        try:
            from torchmetrics.detection import MeanAveragePrecision

            kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if masks else ("bbox",)
            metric = MeanAveragePrecision(
                iou_type=kinds, class_metrics=True, backend="faster_coco_eval"
            )
        except ImportError as error:
            raise ConfigError(
                f"`task='detection'`: torchmetrics with faster-coco-eval cannot be imported "
                f"({one_line(error, 120)}); run pip install 'dtcache[detection]'"
            ) from error
        metric.warn_on_many_detections = False
        self._metric = cast(Any, metric)
        self._num_classes = num_classes
        self._kinds = kinds

    def add(
        self, predicted: Sequence[dict[str, Tensor]], truth: Sequence[dict[str, Tensor]]
    ) -> None:
        """Add images.

        Predictions have `boxes` (N, 4), `scores` (N,), `labels` (N,) and, with masks, bool `masks`
        (N, H, W); the truth has `iscrowd` (N,) in place of scores. A crowd region is ignored.
        """
        self._metric.update(list(predicted), list(truth))

    def compute(self) -> tuple[Precision, Precision | None]:
        """Return the precision of the boxes and, with masks, that of the masks."""
        values = self._metric.compute()
        prefixes = [f"{kind}_" for kind in self._kinds] if len(self._kinds) > 1 else [""]
        precisions = [self._precision(values, prefix) for prefix in prefixes]
        return precisions[0], precisions[1] if len(precisions) > 1 else None

    def _precision(self, values: dict[str, Tensor], prefix: str) -> Precision:
        def share(name: str) -> float | None:
            return _per_cent(float(values[f"{prefix}map{name}"]))

        classes = values["classes"].reshape(-1).tolist()
        by_class = dict(
            zip(classes, values[f"{prefix}map_per_class"].reshape(-1).tolist(), strict=False)
        )
        return Precision(
            ap=share(""),
            ap50=share("_50"),
            ap75=share("_75"),
            small=share("_small"),
            medium=share("_medium"),
            large=share("_large"),
            per_class=tuple(_per_cent(by_class.get(n, -1.0)) for n in range(self._num_classes)),
        )


def _per_cent(share: float) -> float | None:
    """Return a share as per cent; COCO's -1 means that there is no object."""
    return None if share < 0 or math.isnan(share) else 100 * share
