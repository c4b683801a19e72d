"""A trained student beside its teacher: features of the same held-out images, in the same colours."""

import dataclasses
from pathlib import Path

import torch

from dtcache.cache.cache import Cache
from dtcache.cache.label_set import LabelSet
from dtcache.cache.selection import cache_identity, split_rows
from dtcache.device import configure_process, resolve_compute
from dtcache.errors import CacheDamagedError, CacheMismatchError, ConfigError
from dtcache.losses.objective import LABEL_TARGET
from dtcache.options import InspectOptions, TrainOptions, parse_size
from dtcache.recipe import Json
from dtcache.student import Student, build_student
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
from pipelines.runs.folder import load_checkpoint
from pipelines.train.cached_batches import feature_names
from pipelines.train.train_state import exported_weights


def student_gallery(root: Path, report: Json, options: InspectOptions) -> Gallery:
    """Return held-out images with the teacher's and the student's features side by side.

    Raises CacheMismatchError where `options.cache` is not the one that the run was trained on, ConfigError where its
    images are not at hand, CacheDamagedError where the checkpoint is not whole.
    """
    assert options.cache is not None, "asked where one is given"
    made_from = report["options"]
    if "cache" not in made_from:
        raise ConfigError(
            f"--cache {options.cache}: {root} was trained with the teacher in the loop, on no cache; leave it out"
        )
    chosen = _train_options(made_from)
    cache = Cache(
        options.cache, options.images, allow="incomplete" if chosen.allow_incomplete else "nothing"
    )
    found = cache_identity(cache)
    if any(made_from.get(name) != value for name, value in found.items()):
        raise CacheMismatchError(
            f"--cache {options.cache}: not the cache that {root} was trained on: expected fingerprint "
            f"{made_from['cache'][:16]}, got {found['cache'][:16]}, or its samples are others now"
        )
    names = feature_names(cache, chosen)
    usable = cache.reader.usable_rows[: chosen.limit]
    _, held = split_rows(usable, cache.samples["key"].take(usable).to_pylist())
    rows = held[:BASIS_ROWS]
    student, device = _student(root, cache, chosen, names, options.device)
    batch = cache.batch(rows, [0] * len(rows), names)
    with torch.inference_mode():
        predicted = student(batch.images_BCHW.to(device))
        targets = cache.decoder(names)(batch.coefficients)
    beside: list[list[Picture]] = [[] for _ in rows[: options.gallery]]
    keys = [cache.samples["key"][int(row)].as_py() for row in rows]
    for name in names:
        target_BCHW = targets[name]
        if chosen.whitening == "position":
            target_BCHW = whiten_positions(unwhiten(target_BCHW, batch.scalars[name]))
        basis = colour_basis(target_BCHW.numpy())
        student_BCHW = predicted[name].float().cpu()
        error_B = (student_BCHW - target_BCHW).square().mean((1, 2, 3))
        for place, pictures in enumerate(beside):
            for what, maps, note in (
                ("teacher", target_BCHW, ""),
                ("student", student_BCHW, f"MSE {error_B[place]:.2f}"),
            ):
                uri = map_uri(basis.colours(maps[place].numpy()))
                pictures.append(Picture(uri=uri, alt=f"{name} of {keys[place]}, {what}", note=note))
    photos = photos_of(cache, rows[: options.gallery])
    return Gallery(
        headings=tuple(f"{name} {what}" for name in names for what in ("teacher", "student")),
        rows=tuple(
            GalleryRow(
                key=keys[i],
                note=class_name(cache, int(rows[i])),
                photo=photos[i],
                pictures=tuple(pictures),
            )
            for i, pictures in enumerate(beside)
        ),
    )


def _train_options(recorded: Json) -> TrainOptions:
    """Return the options of a run as recorded; those that this dtcache does not know are left out."""
    known = {f.name: f for f in dataclasses.fields(TrainOptions)}
    values = {name: value for name, value in recorded.items() if name in known and name != "images"}
    try:
        return TrainOptions(**values)
    except TypeError as error:
        raise CacheDamagedError(
            f"run.json: not the options of dtcache train ({error}); train again"
        ) from error


def _student(
    root: Path, cache: Cache, options: TrainOptions, names: list[str], where: str
) -> tuple[Student, torch.device]:
    """Return the student that a run exports, as of its last checkpoint, for evaluation."""
    state = load_checkpoint(root)
    if state is None:
        raise CacheDamagedError(
            f"{root}: no checkpoint yet; its page needs one, or leave --cache out"
        )
    compute = resolve_compute(where, "fp32")
    configure_process(compute.device)
    labels = (
        {LABEL_TARGET: LabelSet(cache, options.labels).shape} if options.labels is not None else {}
    )
    student = build_student(
        options.student,
        {name: cache.shape(name) for name in names} | labels,
        cache.view,
        size=parse_size(options.student_size, "student_size") if options.student_size else None,
        width=options.fpn_width,
        init=None,
        seed=options.seed,
        regressor=options.regressor,
    )
    try:
        student.load_state_dict(exported_weights(state))
    except (RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CacheDamagedError(
            f"{root}: the checkpoint is not of this student ({reason}); train again"
        ) from error
    return student.to(compute.device).to(memory_format=torch.channels_last).eval(), compute.device
