"""Measures how features follow flips and crops, and the error of the DDIM round trip.

Shape suffixes: B batch, C channels, H rows, W columns.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.errors import TeacherError
from dtcache.images import load_views
from dtcache.recipe import Box, Equivariance
from dtcache.teacher import TeacherBatch
from dtcache.teacher.ddim_inversion import Inversion
from dtcache.whitening import whiten
from pipelines.extract.plan import ExtractionPlan
from pipelines.terminal.progress import track

IMAGES = 8
"""Images to measure on: a pass or two, under 1 % of the time of a few thousand images."""

Features = Mapping[str, Tensor]
"""Raw maps (B, C, H, W) by array."""
Views = Mapping[int, NDArray[np.uint8]]
"""Decoded views (3, H, W) by row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The measurements of a teacher that a recipe records."""

    equivariance: Equivariance
    round_trip: dict[str, float] | None
    """Mean relative error by timestep, such as t150; None if images are noised, not inverted."""


def measure(plan: ExtractionPlan, rows: int) -> Measured:
    """Measure the teacher on the first decodable images among the first `rows` rows.

    Features are whitened with the mean and deviation of the uncropped image's features; an error is
    0 if the features follow the flip or crop exactly. Raises TeacherError if features or an
    inversion are not finite.
    """
    views = _first_views(plan, rows, min(IMAGES, max(1, plan.teacher.spec.batch_size // 2)))
    threads = torch.get_num_threads()
    with track("measure teacher", 3) as progress:
        original, mirrored = _both_flips(plan, views)
        progress.advance()
        cropped = _cropped(plan, views)
        progress.advance()
        round_trip = _round_trip(plan, views)
        progress.advance()
    box = plan.teacher.crop
    # The recipe holds these sums, whose last bits depend on the number of threads.
    torch.set_num_threads(1)
    try:
        flip = {
            name: whitened_error(mirrored[name], maps.flip(3), maps)
            for name, maps in original.items()
        }
        crop, interior = (
            _crop_errors(plan, original, cropped, box) if cropped and box else (None, None)
        )
    finally:
        torch.set_num_threads(threads)
    equivariance = Equivariance(
        images=len(views), flip=flip, box=box, crop=crop, crop_interior=interior
    )
    return Measured(equivariance=equivariance, round_trip=round_trip)


def whitened_error(got_BCHW: Tensor, expected_BCHW: Tensor, original_BCHW: Tensor) -> float:
    """Return ||got - expected||^2 / ||expected||^2 in float64, or 0 if `expected` is zero.

    Both are whitened with the mean and deviation of each sample of `original`.
    """
    _, mu_B, sigma_B = (x.double() for x in whiten(original_BCHW))
    mu = mu_B[:, None, None, None]
    sigma = sigma_B[:, None, None, None]
    error = float(((got_BCHW.double() - expected_BCHW.double()) / sigma).square().sum())
    energy = float(((expected_BCHW.double() - mu) / sigma).square().sum())
    return error / energy if energy > 0 else 0.0


def cut(maps_BCHW: Tensor, box: Box, height: int, width: int) -> Tensor:
    """Crop maps to the region that `box` covers in a view of height x width pixels."""
    rows = maps_BCHW.shape[2] / height
    columns = maps_BCHW.shape[3] / width
    top, bottom = (round(y * rows) for y in (box.top, box.top + box.height))
    left, right = (round(x * columns) for x in (box.left, box.left + box.width))
    return maps_BCHW[:, :, top:bottom, left:right]


def middle(maps_BCHW: Tensor) -> Tensor:
    """Return maps without a quarter of the rows and columns on each side, at least one.

    The result is empty if nothing is left.
    """
    y, x = (max(1, side // 4) for side in maps_BCHW.shape[2:])
    return maps_BCHW[:, :, y:-y, x:-x]


def _first_views(plan: ExtractionPlan, rows: int, most: int) -> Views:
    """Return up to `most` views that can be decoded, by row."""
    decoded: dict[int, NDArray[np.uint8]] = {}
    indices = [sample.index for sample in plan.samples[:rows]]
    views = load_views(plan.source, indices, plan.view, threads=1)
    for row, view in enumerate(views):
        if view.pixels_CHW is not None:
            decoded[row] = view.pixels_CHW
        if len(decoded) == most:
            break
    views.close()
    return decoded


def _both_flips(plan: ExtractionPlan, views: Views) -> tuple[Features, Features]:
    """Return features of images, and of mirrored images with mirrored noise, in one pass."""
    count = len(views)

    def mirror(twice: Tensor) -> Tensor:
        return torch.cat([twice[:count], twice[count:].flip(3)])

    features = _features(plan, _batch(plan, views, times=2).changed(mirror))
    original = {name: x_BCHW[:count] for name, x_BCHW in features.items()}
    mirrored = {name: x_BCHW[count:] for name, x_BCHW in features.items()}
    return original, mirrored


def _cropped(plan: ExtractionPlan, views: Views) -> Features | None:
    """Return features of cropped images with cropped noise; None if there is no crop."""
    box = plan.teacher.crop
    if box is None:
        return None
    height = plan.view.height
    width = plan.view.width
    return _features(plan, _batch(plan, views).changed(lambda x: cut(x, box, height, width)))


def _crop_errors(
    plan: ExtractionPlan, original: Features, cropped: Features, box: Box
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the errors of the crops by array, and those of their middle if it has positions."""
    crop = {}
    interior = {}
    for name, got in cropped.items():
        expected = cut(original[name], box, plan.view.height, plan.view.width)
        crop[name] = whitened_error(got, expected, original[name])
        if middle(got).numel():
            interior[name] = whitened_error(middle(got), middle(expected), original[name])
    return crop, interior


@torch.inference_mode()
def _round_trip(plan: ExtractionPlan, views: Views) -> dict[str, float] | None:
    """Return the mean error of images that are inverted and denoised back, by timestep.

    None if images are noised instead.
    """
    encoding = plan.teacher.encoding
    if not isinstance(encoding, Inversion):
        return None
    batch = _batch(plan, views)
    clean_BCHW = plan.teacher.clean(batch)
    labels_B = plan.teacher.labels(batch)
    errors = {}
    for t in plan.teacher.spec.timesteps:
        error = float(encoding.round_trip(clean_BCHW, t, labels_B)[: len(views)].mean())
        if not math.isfinite(error):
            raise TeacherError(
                f"`encoding='ddim'`: images inverted to `timestep={t}` are not finite; pass a "
                "lower `timestep`"
            )
        errors[f"t{t}"] = error
    return errors


def _batch(plan: ExtractionPlan, views: Views, times: int = 1) -> TeacherBatch:
    """Return the views, not mirrored, with the noise of draw 0; the whole list `times` times."""
    inputs = [plan.input(pixels_CHW, row, False, [0]) for row, pixels_CHW in views.items()]
    return plan.teacher.batch(inputs * times)


def _features(plan: ExtractionPlan, batch: TeacherBatch) -> Features:
    """Return raw features on the host. Raises TeacherError if they are not finite."""
    (raw,) = plan.teacher.features(batch)
    for name, maps_BCHW in raw.items():
        if not torch.isfinite(maps_BCHW).all():
            raise TeacherError(
                f"the teacher's output is not finite at {name} of a mirrored or cropped image; "
                "try `precision='fp32'`"
            )
    return {name: maps_BCHW.cpu() for name, maps_BCHW in raw.items()}
