"""Validation of a manifest: sizes within bounds, and only values that a reader supports."""

import math
import re
from typing import get_args

from dtcache.recipe import (
    MAX_SAMPLES,
    MAX_SHARD_ROWS,
    MAX_SHARDS,
    MAX_SIDE,
    MAX_VIEWS,
    CodecName,
    ConditionKind,
    Json,
    tap_name,
)
from dtcache.store.label_sets import check_labels
from dtcache.store.layout import PayloadArray

MAX_PAYLOAD_BYTES = 1 << 28
MAX_VALUES = MAX_PAYLOAD_BYTES // 2
"""Maximum values of one sample's map: as float16, the map is one payload."""
FITS = ("crop", "stretch")
STORED = ("view", "none")
CODECS = get_args(CodecName)
CONDITIONS = get_args(ConditionKind)
BOX = ("top", "left", "height", "width")
ARRAY_NAME = re.compile(r"[a-z0-9]+(/[a-z0-9]+)?")


def checked_array(name: str, value: Json) -> PayloadArray:
    """Return the array that a manifest describes.

    Raises ValueError if its sizes exceed the bounds.
    """
    array = PayloadArray(
        name=name, shape=tuple(map(int, value["shape"])), shard_rows=int(value["shard_rows"])
    )
    valid = (
        len(array.shape) in (2, 3) and min(array.shape) > 0 and array.length <= MAX_PAYLOAD_BYTES
    )
    valid = valid and array.payloads_per_row <= MAX_VIEWS
    if not (valid and 0 < array.shard_rows <= MAX_SHARD_ROWS and ARRAY_NAME.fullmatch(name)):
        raise ValueError(
            f"array {name[:40]!r} of shape {value['shape']} in shards of {value['shard_rows']} rows"
        )
    return array


def check_recipe(recipe: Json) -> None:
    """Check the fields of a recipe that readers use. Raises KeyError, TypeError or ValueError."""
    view = recipe["view"]
    teacher = recipe["teacher"]
    codec = recipe["codec"]
    sides = (view["height"], view["width"])
    if (
        not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in sides)
        or view["fit"] not in FITS
    ):
        raise ValueError(f"view {view}")
    for tap in teacher["taps"]:
        shape = [tap[side] for side in ("channels", "height", "width")]
        if (
            not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in shape)
            or math.prod(shape) > MAX_VALUES
        ):
            raise ValueError(f"tap {tap}")
    if "condition" in teacher:
        _check_condition(teacher["condition"])
    if len(teacher["timesteps"]) * len(teacher["taps"]) != len(codec["noise_share"]):
        raise ValueError("the codec's taps are not the teacher's")
    names = [tap_name(t, tap["name"]) for t in teacher["timesteps"] for tap in teacher["taps"]]
    if not all(
        set(codec[field]) == set(names)
        for field in ("noise_share", "noise_floor", "determined_error")
    ):
        raise ValueError("the codec's taps are not the teacher's")
    if codec["name"] not in CODECS:
        raise ValueError(f"codec {codec['name']!r}; this dtcache reads {' and '.join(CODECS)}")
    if (
        not (isinstance(recipe["draws"], int) and 0 < recipe["draws"] <= MAX_VIEWS)
        or recipe["images"] not in STORED
    ):
        raise ValueError(f"{recipe['draws']!r} draws, images {recipe['images']!r}")
    for name in ("num_samples", "flips", "average", "seed", "shard_rows"):
        if not isinstance(recipe[name], int):
            raise ValueError(f"{name} {recipe[name]!r}")
    if not 0 < recipe["num_samples"] <= min(MAX_SAMPLES, MAX_SHARDS * recipe["shard_rows"]):
        raise ValueError(
            f"{recipe['num_samples']} samples in shards of {recipe['shard_rows']} rows"
        )
    _check_measured(recipe, names)
    if "labels" in recipe:
        check_labels(recipe["labels"], names, teacher["taps"])


def _check_measured(recipe: Json, names: list[str]) -> None:
    """Check the values measured of noise and teacher. Raises KeyError, TypeError or ValueError."""
    teacher = recipe["teacher"]
    measured = recipe.get("equivariance")
    counts = []
    errors = [(recipe.get("round_trip"), [f"t{t}" for t in teacher["timesteps"]])]
    if teacher.get("ddim_steps") is not None:
        counts.append(teacher["ddim_steps"])
    if measured is not None:
        box = measured["box"]
        counts += [measured["images"], *(box[side] for side in BOX if box is not None)]
        errors += [(measured[name], names) for name in ("flip", "crop", "crop_interior")]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError(f"ddim_steps or equivariance: {counts}")
    if len(teacher["alpha_bars"]) != len(teacher["timesteps"]) or not all(
        0 <= a <= 1 for a in teacher["alpha_bars"]
    ):
        raise ValueError(f"alpha_bars {teacher['alpha_bars']}")
    for by_name, known in errors:
        if not set(by_name or {}) <= set(known) or not all(
            0 <= e < math.inf for e in (by_name or {}).values()
        ):
            raise ValueError(f"measured {by_name}")


def _check_condition(condition: Json) -> None:
    """Check the condition of a teacher. Raises KeyError, TypeError or ValueError."""
    kind = condition["kind"]
    valid = kind in CONDITIONS
    if kind == "class":
        valid = isinstance(condition["number"], int)
    elif kind == "prompt":
        valid = isinstance(condition["prompt"], str) and isinstance(
            condition["embedding_sha256"], str
        )
    if not valid:
        raise ValueError(f"condition {condition}")
