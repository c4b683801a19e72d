"""The check of a manifest: types, sizes within bounds, and only values that a reader supports."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dtcache.recipe import (
    MAX_SAMPLES,
    MAX_SHARD_ROWS,
    MAX_SHARDS,
    MAX_SIDE,
    MAX_VIEWS,
    Json,
    Recipe,
    tap_name,
)
from dtcache.store.commits import CodecSums
from dtcache.store.json_types import check_types
from dtcache.store.label_sets import check_labels, check_measured
from dtcache.store.layout import CODEC, FAILURES, PROMPT, SAMPLES, SHARDS, PayloadArray
from dtcache.store.parquet_tables import TablePart

MAX_PAYLOAD_BYTES = 1 << 28
MAX_VALUES = 1 << 26
"""Most values of one sample's map: 256 channels of a stride-1 map of 512x512 pixels."""
MAX_FIT_BYTES = 1 << 29
"""Most bytes of the codec's arrays: a hundred maps of 320 channels of 128x128."""
MAX_ARRAYS = 1 << 12
"""Most codecs: timesteps times taps."""
BOX = ("top", "left", "height", "width")
ARRAY_NAME = re.compile(r"[a-z0-9]+")
FILE_NAME = re.compile(
    rf"{re.escape(SAMPLES)}|{re.escape(FAILURES)}|{re.escape(SHARDS)}|{re.escape(PROMPT)}"
    rf"|{re.escape(CODEC)}|data\.zarr/([a-z0-9_]+/)*zarr\.json"
)
"""The files whose hashes a manifest holds: none of them lies outside the cache's folder."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _ArrayFields:
    shape: tuple[int, ...]
    shard_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _ManifestFields:
    """The fields of manifest.json, except its format and its own hash."""

    state: Literal["writing", "sealed"]
    recipe: Recipe
    fingerprint: str
    arrays: dict[str, _ArrayFields]
    classes: tuple[str, ...] | None
    files: dict[str, str]
    samples: tuple[TablePart, ...]
    sums: dict[str, CodecSums]
    measured: Any = None


def check_manifest(value: Json) -> dict[str, PayloadArray]:
    """Check every field of a manifest that a reader uses; return its payload arrays by name.

    Raises ValueError, or KeyError or TypeError for measurements of a label set.
    """
    check_types(value, _ManifestFields, "manifest")
    for name, sha256 in value["files"].items():
        if not FILE_NAME.fullmatch(name) or not _SHA256.fullmatch(sha256):
            raise ValueError(f"files: {name[:80]!r} with the SHA-256 {sha256[:64]!r}")
    for name in (SAMPLES, FAILURES) if value["state"] == "sealed" else ():
        if name not in value["files"]:
            raise ValueError(f"files: {name} is missing")
    if not _SHA256.fullmatch(value["fingerprint"]):
        raise ValueError(f"fingerprint {value['fingerprint'][:64]!r}")
    arrays = {
        name: _checked_array(name, array, value["fingerprint"])
        for name, array in value["arrays"].items()
    }
    check_recipe(value["recipe"])
    for part in value["samples"]:
        if part["bytes"] < 0 or not _SHA256.fullmatch(part["sha256"]):
            raise ValueError(f"samples: a part {str(part)[:100]}")
    check_measured(value.get("measured"))
    return arrays


def _checked_array(name: str, value: Json, fingerprint: str) -> PayloadArray:
    """Return the array that a manifest describes.

    Raises ValueError if its sizes exceed the bounds.
    """
    array = PayloadArray(
        name=name,
        fingerprint=fingerprint,
        shape=tuple(value["shape"][:4]),
        shard_rows=value["shard_rows"],
    )
    valid = (
        len(array.shape) in (2, 3) and min(array.shape) > 0 and array.length <= MAX_PAYLOAD_BYTES
    )
    valid = valid and array.payloads_per_row <= MAX_VIEWS
    if not (valid and 0 < array.shard_rows <= MAX_SHARD_ROWS and ARRAY_NAME.fullmatch(name)):
        raise ValueError(
            f"array {name[:40]!r} of shape {value['shape'][:4]} in shards of "
            f"{value['shard_rows']} rows"
        )
    return array


def check_recipe(recipe: Json) -> None:
    """Check the bounds of a recipe whose types are right, and that its fields agree.

    Raises ValueError, or KeyError or TypeError for scores of a label set.
    """
    view = recipe["view"]
    teacher = recipe["teacher"]
    codec = recipe["codec"]
    if not all(0 < side <= MAX_SIDE for side in (view["height"], view["width"])):
        raise ValueError(f"view {view}")
    if not 0 < len(teacher["timesteps"]) * len(teacher["taps"]) <= MAX_ARRAYS:
        raise ValueError(
            f"{len(teacher['timesteps'])} timesteps and {len(teacher['taps'])} taps, expected 1 "
            f"to {MAX_ARRAYS} arrays"
        )
    for tap in teacher["taps"]:
        shape = [tap[side] for side in ("channels", "height", "width")]
        if not all(0 < side <= MAX_SIDE for side in shape) or math.prod(shape) > MAX_VALUES:
            raise ValueError(f"tap {tap}")
    if "condition" in teacher:
        _check_condition(teacher["condition"])
    names = [tap_name(t, tap["name"]) for t in teacher["timesteps"] for tap in teacher["taps"]]
    if not all(
        len(names) == len(codec[field]) and set(codec[field]) == set(names)
        for field in ("noise_share", "noise_floor", "determined_error")
    ):
        raise ValueError("the codec's taps are not the teacher's")
    is_quantised = codec["name"] != "float16"
    for field in ("ratio", "step"):
        value = codec[field]
        if (value is not None) != is_quantised or (value is not None and value <= 0):
            raise ValueError(f"codec {codec['name']} with the {field} {value}")
    if is_quantised and _fit_bytes(teacher) > MAX_FIT_BYTES:
        raise ValueError(
            f"codec arrays of up to {_fit_bytes(teacher)} bytes, expected at most {MAX_FIT_BYTES}"
        )
    if not 0 < recipe["draws"] <= MAX_VIEWS:
        raise ValueError(f"{recipe['draws']!r} draws")
    if not 0 < recipe["num_samples"] <= min(MAX_SAMPLES, MAX_SHARDS * recipe["shard_rows"]):
        raise ValueError(
            f"{recipe['num_samples']} samples in shards of {recipe['shard_rows']} rows"
        )
    _check_measured(recipe, names)
    if "labels" in recipe:
        check_labels(recipe["labels"], names, teacher["taps"])


def _fit_bytes(teacher: Json) -> int:
    """Return an upper bound of the largest codec arrays of all taps: the basis, or the classes."""
    sizes: Iterator[int] = (
        max(2 * tap["channels"] ** 2, tap["channels"] * tap["height"] * tap["width"])
        for tap in teacher["taps"]
    )
    return len(teacher["timesteps"]) * sum(sizes)


def _check_measured(recipe: Json, names: list[str]) -> None:
    """Check the values measured of noise and teacher. Raises ValueError."""
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
    if not all(count >= 0 for count in counts):
        raise ValueError(f"ddim_steps or equivariance: {counts}")
    if len(teacher["alpha_bars"]) != len(teacher["timesteps"]) or not all(
        0 <= a <= 1 for a in teacher["alpha_bars"]
    ):
        raise ValueError(f"alpha_bars {teacher['alpha_bars'][:8]}")
    for by_name, known in errors:
        if not set(by_name or {}) <= set(known) or not all(
            e >= 0 for e in (by_name or {}).values()
        ):
            raise ValueError(f"measured {str(by_name)[:200]}")


def _check_condition(condition: Json | None) -> None:
    """Check the condition of a teacher. Raises ValueError."""
    kind = condition["kind"] if condition is not None else None
    needed = {"class": ("number",), "prompt": ("prompt", "embedding_sha256")}.get(kind or "", ())
    if condition is not None and any(condition.get(name) is None for name in needed):
        raise ValueError(f"condition {str(condition)[:200]}")
