"""What is measured of a teacher before the first shard: how its features follow flips and crops; DDIM's round trip."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dtcache.errors import TeacherError
from dtcache.images import LoadedView, load_views
from dtcache.recipe import Box, Equivariance
from dtcache.teacher import TeacherBatch
from dtcache.teacher.ddim_inversion import Inversion
from dtcache.whitening import whiten
from pipelines.extract.plan import Job
from pipelines.terminal.progress import track

IMAGES = 8
"""A pass or two: under a hundredth of an extraction of a few thousand images."""

Features = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a recipe records of its teacher."""

    equivariance: Equivariance | None
    round_trip: dict[str, float] | None
    """By timestep, such as t150; None where images are noised."""


def measure(job: Job, rows: int) -> Measured:
    """Measure a teacher on the first images among `rows` leading rows that can be decoded, as their views are cached.

    Features are whitened with the mean and deviation of the whole image's: a teacher that follows exactly errs by 0.
    Raises TeacherError where features or an inversion are not finite.
    """
    loaded, numbers = _first_images(
        job, rows, min(IMAGES, max(1, job.teacher.spec.batch_size // 2))
    )
    threads = torch.get_num_threads()
    with track("measure teacher", 3) as progress:
        whole, mirrored = _both_sides(job, loaded, numbers)
        progress.advance()
        cropped = _cropped(job, loaded, numbers)
        progress.advance()
        round_trip = _round_trip(job, loaded, numbers)
        progress.advance()
    box = job.teacher.crop
    # Sums in one thread: their last bits are in the recipe.
    torch.set_num_threads(1)
    try:
        flip = {
            name: whitened_error(mirrored[name], whole[name].flip(3), whole[name]) for name in whole
        }
        crop, interior = _crop_errors(job, whole, cropped, box) if cropped and box else (None, None)
    finally:
        torch.set_num_threads(threads)
    equivariance = Equivariance(
        images=len(loaded), flip=flip, box=box, crop=crop, crop_interior=interior
    )
    return Measured(equivariance=equivariance, round_trip=round_trip)


def whitened_error(found_BCHW: Tensor, wanted_BCHW: Tensor, whole_BCHW: Tensor) -> float:
    """Return ||found - wanted||^2 / ||wanted||^2 in float64, both whitened as `whole` is; 0 of maps that are zero."""
    _, mu_B, sigma_B = (x.double() for x in whiten(whole_BCHW))
    mu = mu_B[:, None, None, None]
    sigma = sigma_B[:, None, None, None]
    error = float(((found_BCHW.double() - wanted_BCHW.double()) / sigma).square().sum())
    energy = float(((wanted_BCHW.double() - mu) / sigma).square().sum())
    return error / energy if energy > 0 else 0.0


def cut(maps_BCHW: Tensor, box: Box, height: int, width: int) -> Tensor:
    """Return the part of maps that a box of a height x width view covers, each side in proportion."""
    rows = maps_BCHW.shape[2] / height
    columns = maps_BCHW.shape[3] / width
    top, bottom = (round(y * rows) for y in (box.top, box.top + box.height))
    left, right = (round(x * columns) for x in (box.left, box.left + box.width))
    return maps_BCHW[:, :, top:bottom, left:right]


def middle(maps_BCHW: Tensor) -> Tensor:
    """Return maps without a quarter of their rows and columns on each side, at least one; empty where none is left."""
    y, x = (max(1, side // 4) for side in maps_BCHW.shape[2:])
    return maps_BCHW[:, :, y:-y, x:-x]


def _first_images(job: Job, rows: int, most: int) -> tuple[list[LoadedView], list[int]]:
    """Return up to `most` images that can be decoded, and their rows."""
    found: list[tuple[LoadedView, int]] = []
    views = load_views(
        job.source, [sample.index for sample in job.samples[:rows]], job.view, threads=1
    )
    for row, view in enumerate(views):
        if view.pixels_CHW is not None:
            found.append((view, row))
        if len(found) == most:
            break
    views.close()
    return [view for view, _ in found], [row for _, row in found]


def _both_sides(job: Job, loaded: list[LoadedView], rows: list[int]) -> tuple[Features, Features]:
    """Return features of the images and, in the same pass, of their mirror images with mirrored noise."""
    count = len(loaded)

    def mirror(twice: Tensor) -> Tensor:
        return torch.cat([twice[:count], twice[count:].flip(3)])

    found = _features(job, _batch(job, loaded * 2, rows * 2).changed(mirror))
    return {name: x[:count] for name, x in found.items()}, {
        name: x[count:] for name, x in found.items()
    }


def _cropped(job: Job, loaded: list[LoadedView], rows: list[int]) -> Features | None:
    """Return features of the cropped images with cropped noise, None where no crop can be taken."""
    box = job.teacher.crop
    view = job.view
    if box is None:
        return None
    return _features(
        job, _batch(job, loaded, rows).changed(lambda x: cut(x, box, view.height, view.width))
    )


def _crop_errors(
    job: Job, whole: Features, cropped: Features, box: Box
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the error of the crops' features by array, and that of their middle where there is one."""
    crop = {}
    interior = {}
    for name, found in cropped.items():
        wanted = cut(whole[name], box, job.view.height, job.view.width)
        crop[name] = whitened_error(found, wanted, whole[name])
        if middle(found).numel():
            interior[name] = whitened_error(middle(found), middle(wanted), whole[name])
    return crop, interior


@torch.inference_mode()
def _round_trip(job: Job, loaded: list[LoadedView], rows: list[int]) -> dict[str, float] | None:
    """Return the mean error of images inverted and denoised back by timestep, None where images are noised."""
    encoding = job.teacher.encoding
    if not isinstance(encoding, Inversion):
        return None
    batch = _batch(job, loaded, rows)
    clean_BCHW = job.teacher.clean(batch)
    labels_B = job.teacher.labels(batch)
    errors = {}
    for t in job.teacher.spec.timesteps:
        error = float(encoding.round_trip(clean_BCHW, t, labels_B)[: len(loaded)].mean())
        if not math.isfinite(error):
            raise TeacherError(
                f"--encoding ddim: images inverted to --timestep {t} are not finite; give a lower one"
            )
        errors[f"t{t}"] = error
    return errors


def _batch(job: Job, loaded: list[LoadedView], rows: list[int]) -> TeacherBatch:
    """Return the images, not mirrored, with the noise of draw 0."""
    return job.teacher.batch(
        [job.input(view, row, False, [0]) for view, row in zip(loaded, rows, strict=True)]
    )


def _features(job: Job, batch: TeacherBatch) -> Features:
    """Return raw features on the host. Raises TeacherError where they are not finite."""
    (raw,) = job.teacher.features(batch)
    for name, maps_BCHW in raw.items():
        if not torch.isfinite(maps_BCHW).all():
            raise TeacherError(
                f"the teacher's output is not finite at {name} of a mirrored or cropped image; try --precision fp32"
            )
    return {name: maps_BCHW.cpu() for name, maps_BCHW in raw.items()}
