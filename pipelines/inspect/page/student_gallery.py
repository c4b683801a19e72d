"""A student beside its teacher: features of the same held-out images in the same colours."""

import dataclasses
from pathlib import Path

import torch

from dtcache.cache.cache import Cache
from dtcache.cache.label_set import LabelSet
from dtcache.cache.selection import split_rows
from dtcache.device import resolve_compute
from dtcache.errors import CacheDamagedError, CacheMismatchError, ConfigError, one_line
from dtcache.losses.objective import LABEL_TARGET
from dtcache.optim import require_same_tensors
from dtcache.options import InspectOptions, TrainOptions
from dtcache.options.images import READING_NAMES
from dtcache.process_settings import configure_process
from dtcache.recipe import Json
from dtcache.store.reader import Allowed
from dtcache.store.sample_index import Keys
from dtcache.student import Student
from dtcache.whitening import unwhiten, whiten_positions
from pipelines.inspect.page.gallery import (
    BASIS_ROWS,
    Gallery,
    GalleryRow,
    Picture,
    class_name,
    photos_of,
)
from pipelines.inspect.page.pictures import colour_basis, map_uri
from pipelines.runs.checkpoint import load_checkpoint
from pipelines.train.cached_batches import feature_names
from pipelines.train.trainer import exported_weights, new_student


def student_gallery(root: Path, report: Json, cache_root: Path, options: InspectOptions) -> Gallery:
    """Return held-out images with the teacher's and the student's features side by side.

    Raises ConfigError if the run was not trained on a cache, CacheMismatchError if `cache_root` is
    not the cache that the run was trained on, ConfigError if its images are not available, and
    CacheDamagedError if there is no readable checkpoint.
    """
    recorded = report["options"]
    cache = _open_cache(root, recorded, cache_root, options)
    train_options = _train_options(recorded)
    names = feature_names(cache, train_options)
    usable = cache.reader.usable[: train_options.limit]
    _, held_out = split_rows(usable, Keys(cache.reader.samples.keys, usable))
    rows = held_out[:BASIS_ROWS].array()
    student, device = _student(root, cache, train_options, names, options.device)
    batch = cache.batch(rows, [0] * len(rows), names)
    with torch.inference_mode():
        predicted = student(batch.images_BCHW.to(device))
        targets = cache.decoder(names)(batch.coefficients)
    keys = [cache.samples["key"][int(row)].as_py() for row in rows]
    shown = rows[: options.gallery]
    pictures: list[list[Picture]] = [[] for _ in shown]
    for name in names:
        teacher_BCHW = targets[name]
        if train_options.whitening == "position":
            teacher_BCHW = whiten_positions(unwhiten(teacher_BCHW, batch.scalars[name]))
        basis = colour_basis(teacher_BCHW.numpy())
        student_BCHW = predicted[name].float().cpu()
        error_B = (student_BCHW - teacher_BCHW).square().mean((1, 2, 3))
        for index, row_pictures in enumerate(pictures):
            alt = f"{name} of {keys[index]}"
            uri = map_uri(basis.colours(teacher_BCHW[index].numpy()))
            row_pictures.append(Picture(uri=uri, alt=f"{alt}, teacher"))
            uri = map_uri(basis.colours(student_BCHW[index].numpy()))
            note = f"MSE {error_B[index]:.2f}"
            row_pictures.append(Picture(uri=uri, alt=f"{alt}, student", note=note))
    photos = photos_of(cache, shown)
    return Gallery(
        headings=tuple(f"{name} {whose}" for name in names for whose in ("teacher", "student")),
        rows=tuple(
            GalleryRow(
                key=keys[index],
                note=class_name(cache, int(row)),
                photo=photos[index],
                pictures=tuple(pictures[index]),
            )
            for index, row in enumerate(shown)
        ),
    )


def _open_cache(root: Path, recorded: Json, cache_root: Path, options: InspectOptions) -> Cache:
    """Open the cache of a run. Raises ConfigError or CacheMismatchError if it is another one."""
    if "caches" in recorded:
        raise ConfigError(
            f"`cache` {cache_root}: {root} was trained on several caches, and pictures are made of "
            "runs on one cache; leave it out"
        )
    if "cache" not in recorded:
        raise ConfigError(
            f"`cache` {cache_root}: {root} was trained with the teacher in the loop, on no cache; "
            "leave it out"
        )
    allow: Allowed = "incomplete" if recorded.get("allow_incomplete") else "nothing"
    cache = Cache(cache_root, options.images, allow=allow, reading=options.reading)
    identity = cache.reader.data_identity
    if any(recorded.get(name) != value for name, value in identity.items()):
        raise CacheMismatchError(
            f"`cache` {cache_root}: not the cache that {root} was trained on: expected fingerprint "
            f"{recorded['cache'][:16]}, got {identity['cache'][:16]}, or its samples have changed"
        )
    return cache


def _train_options(recorded: Json) -> TrainOptions:
    """Return a run's recorded options, without those that this version does not know."""
    known = {f.name for f in dataclasses.fields(TrainOptions)}
    # The images, and how they were read, are those of this command.
    known -= {"images", *READING_NAMES}
    values = {name: value for name, value in recorded.items() if name in known}
    try:
        return TrainOptions(**values)
    except TypeError as error:
        raise CacheDamagedError(
            f"run.json: not the options of dtcache train ({error}); train again"
        ) from error


def _student(
    root: Path, cache: Cache, options: TrainOptions, names: list[str], where: str
) -> tuple[Student, torch.device]:
    """Return the student that a run exports, from its last checkpoint, in evaluation mode."""
    state = load_checkpoint(root)
    if state is None:
        raise CacheDamagedError(
            f"{root}: no checkpoint yet; the student's features need one; leave `cache` out"
        )
    compute = resolve_compute(where, "fp32")
    configure_process(compute.device)
    shapes = {name: cache.shape(name) for name in names}
    if options.labels is not None:
        shapes[LABEL_TARGET] = LabelSet(cache, options.labels).shape
    # The checkpoint has all weights: the ones that the run started from are not read again.
    student = new_student(shapes, cache.view, dataclasses.replace(options, init=None))
    try:
        weights = exported_weights(state)
        require_same_tensors("student", student.state_dict(), weights)
        student.load_state_dict(weights)
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise CacheDamagedError(
            f"{root}: the checkpoint is not of this student ({one_line(error)}); train again"
        ) from error
    return student.to(compute.device).to(memory_format=torch.channels_last).eval(), compute.device
