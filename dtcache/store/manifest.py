"""The manifest: what the cache is a function of, what files it has, and whether all of them are there."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from dtcache.errors import CacheDamagedError, CacheFormatError, CacheMismatchError, CacheNotFoundError
from dtcache.spec import (
    FORMAT_VERSION,
    MAX_SHARD_ROWS,
    MAX_SIDE,
    MAX_VIEWS,
    CodecName,
    ConditionKind,
    Json,
    Recipe,
    canonical_json,
    sha256_json,
    tap_name,
)
from dtcache.storage import write_file
from dtcache.store.commits import CodecSums
from dtcache.store.label_sets import check_labels
from dtcache.store.layout import MANIFEST, PayloadArray

T = TypeVar("T")

MAX_MANIFEST_BYTES = 64 << 20
MAX_PAYLOAD_BYTES = 1 << 28
FITS = ("crop", "stretch")
STORED = ("view", "none")
CODECS = get_args(CodecName)
CONDITIONS = get_args(ConditionKind)
BOX = ("top", "left", "height", "width")
ARRAY_NAME = re.compile(r"[a-z0-9]+(/[a-z0-9]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheManifest:
    """A cache's recipe as JSON, and the hashes of its files; it holds no clock, path, host or worker count."""

    state: Literal["writing", "sealed"]
    recipe: Json
    """`Recipe.to_json()`; kept as JSON, so that reading it needs no type of a later version."""
    fingerprint: str
    arrays: dict[str, PayloadArray]
    classes: tuple[str, ...] | None
    """Class names by label."""
    files: dict[str, str]
    """SHA-256 by path of every file but shards: zarr.json, codec arrays, Parquet."""
    sums: dict[str, CodecSums]
    """By array, over all rows that the codec was not fitted on; empty until the cache is sealed."""
    measured: Json | None = None
    """Of a sealed label set: what `dtcache label write` measured on it (docs/format.md)."""

    def to_json(self) -> Json:
        """Return the manifest as JSON values, with its own hash."""
        body: Json = {
            "format": FORMAT_VERSION,
            "state": self.state,
            "recipe": self.recipe,
            "fingerprint": self.fingerprint,
            "arrays": {n: {"shape": list(a.shape), "shard_rows": a.shard_rows} for n, a in self.arrays.items()},
            "classes": list(self.classes) if self.classes is not None else None,
            "files": self.files,
            "sums": {n: {"squared_error": s.squared_error, "energy": s.energy} for n, s in self.sums.items()},
        }
        if self.measured is not None:
            body["measured"] = self.measured
        return {**body, "sha256": sha256_json(body)}

    def sealed(
        self, files: dict[str, str], sums: dict[str, CodecSums], measured: Json | None = None
    ) -> "CacheManifest":
        """Return the manifest of the finished cache, with the hashes of files that changed or came."""
        return replace(self, state="sealed", files={**self.files, **files}, sums=sums, measured=measured)

    @property
    def identity(self) -> str:
        """SHA-256 of the whole manifest: with the recipe it covers, once sealed, every file, so the images too."""
        return sha256_json(self.to_json())

    @property
    def tap_names(self) -> list[str]:
        """The arrays of features, timestep by timestep, finest tap first."""
        teacher = self.recipe["teacher"]
        return [tap_name(t, tap["name"]) for t in teacher["timesteps"] for tap in teacher["taps"]]

    @property
    def num_samples(self) -> int:
        """Rows of the cache."""
        return int(self.recipe["num_samples"])

    @property
    def num_views(self) -> int:
        """Views of a row: view = draw x flips + flip, where draws are not averaged."""
        return (1 if self.recipe["average"] else int(self.recipe["draws"])) * (2 if self.recipe["flips"] else 1)

    def is_mirrored(self, view: int) -> bool:
        """Return whether a view shows the mirrored image."""
        return bool(self.recipe["flips"]) and view % 2 == 1


def new_manifest(
    recipe: Recipe, arrays: dict[str, PayloadArray], classes: list[str] | None, files: dict[str, str]
) -> CacheManifest:
    """Return the manifest of a cache that is about to be written."""
    return CacheManifest(
        state="writing",
        recipe=recipe.to_json(),
        fingerprint=recipe.fingerprint,
        arrays=arrays,
        classes=tuple(classes) if classes is not None else None,
        files=files,
        sums={},
    )


def write_manifest(root: Path, manifest: CacheManifest) -> None:
    """Write the manifest atomically."""
    write_file(root / MANIFEST, canonical_json(manifest.to_json()))


def read_manifest(root: Path) -> CacheManifest:
    """Read and check a manifest.

    Raises CacheNotFoundError where there is none, CacheDamagedError where it is not as written, and CacheFormatError
    where a newer dtcache wrote it.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise CacheNotFoundError(
            f"{root} is not a cache: expected {MANIFEST} in it; give a folder made by dtcache extract"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CacheDamagedError(f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes, got {path.stat().st_size}")
    try:
        content = path.read_bytes()
        value = json.loads(content)
        version = value["format"]
        if version != FORMAT_VERSION:
            raise CacheFormatError(
                f"{path}: expected format {FORMAT_VERSION}, got {version}; install the dtcache "
                "that wrote it, or a newer one"
            )
        # The bytes too: JSON has many spellings of one value, and only one of them was written.
        if content != canonical_json(value) or value.pop("sha256") != sha256_json(value):
            raise CacheDamagedError(f"{path}: its own checksum does not match; restore it from a copy or extract again")
        arrays = {name: _payload_array(name, a) for name, a in value["arrays"].items()}
        _check_recipe(value["recipe"])
        return CacheManifest(
            state=value["state"],
            recipe=value["recipe"],
            fingerprint=value["fingerprint"],
            arrays=arrays,
            classes=tuple(value["classes"]) if value["classes"] is not None else None,
            files=value["files"],
            sums={n: CodecSums(**s) for n, s in value["sums"].items()},
            measured=value.get("measured"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheDamagedError(f"{path}: not a manifest of dtcache ({error!r}); extract again") from error


def look_at(root: Path, look: Callable[[CacheManifest], T]) -> T:
    """Return what `look` finds in a cache under its manifest, and raise what it raises.

    Where the cache was sealed meanwhile it looks again: commit records go then, and the sample index is another.
    """
    manifest = read_manifest(root)
    try:
        found = look(manifest)
    except CacheDamagedError:
        again = read_manifest(root)
        if again.state == manifest.state:
            raise
    else:
        again = manifest if manifest.state == "sealed" else read_manifest(root)
        if again.state == manifest.state:
            return found
    return look(again)


def _payload_array(name: str, value: Json) -> PayloadArray:
    """Return an array's description, its sizes within bounds. Raises ValueError."""
    array = PayloadArray(name=name, shape=tuple(map(int, value["shape"])), shard_rows=int(value["shard_rows"]))
    sane = len(array.shape) in (2, 3) and min(array.shape) > 0 and array.length <= MAX_PAYLOAD_BYTES
    sane = sane and array.payloads_a_row <= MAX_VIEWS
    if not (sane and 0 < array.shard_rows <= MAX_SHARD_ROWS and ARRAY_NAME.fullmatch(name)):
        raise ValueError(f"array {name[:40]!r} of shape {value['shape']} in shards of {value['shard_rows']} rows")
    return array


def _check_recipe(recipe: Json) -> None:
    """Check what readers rely on. Raises KeyError, TypeError or ValueError."""
    view, teacher, codec = recipe["view"], recipe["teacher"], recipe["codec"]
    sides = (view["height"], view["width"])
    if not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in sides) or view["fit"] not in FITS:
        raise ValueError(f"view {view}")
    for tap in teacher["taps"]:
        if not all(isinstance(tap[k], int) and 0 < tap[k] <= MAX_SIDE for k in ("channels", "height", "width")):
            raise ValueError(f"tap {tap}")
    if "condition" in teacher:
        _check_condition(teacher["condition"])
    names = [tap_name(t, tap["name"]) for t in teacher["timesteps"] for tap in teacher["taps"]]
    if not all(set(codec[field]) == set(names) for field in ("noise_share", "noise_floor", "determined_error")):
        raise ValueError("the codec's taps are not the teacher's")
    if codec["name"] not in CODECS:
        raise ValueError(f"codec {codec['name']!r}; this dtcache reads {' and '.join(CODECS)}")
    if not (isinstance(recipe["draws"], int) and 0 < recipe["draws"] <= MAX_VIEWS) or recipe["images"] not in STORED:
        raise ValueError(f"{recipe['draws']!r} draws, images {recipe['images']!r}")
    for name in ("num_samples", "flips", "average", "seed", "shard_rows"):
        if not isinstance(recipe[name], int):
            raise ValueError(f"{name} {recipe[name]!r}")
    _check_measured(recipe, names)
    if "labels" in recipe:
        check_labels(recipe["labels"], names, teacher["taps"])


def _check_measured(recipe: Json, names: list[str]) -> None:
    """Check what is shown of the noise and of the teacher. Raises KeyError, TypeError or ValueError."""
    teacher, measured = recipe["teacher"], recipe.get("equivariance")
    counts, errors = [], [(recipe.get("round_trip"), [f"t{t}" for t in teacher["timesteps"]])]
    if teacher.get("ddim_steps") is not None:
        counts.append(teacher["ddim_steps"])
    if measured is not None:
        box = measured["box"]
        counts += [measured["images"], *(box[side] for side in BOX if box is not None)]
        errors += [(measured[name], names) for name in ("flip", "crop", "crop_interior")]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError(f"ddim_steps or equivariance: {counts}")
    if len(teacher["alpha_bars"]) != len(teacher["timesteps"]) or not all(0 <= a <= 1 for a in teacher["alpha_bars"]):
        raise ValueError(f"alpha_bars {teacher['alpha_bars']}")
    for by_name, known in errors:
        if not set(by_name or {}) <= set(known) or not all(0 <= e < math.inf for e in (by_name or {}).values()):
            raise ValueError(f"measured {by_name}")


def _check_condition(condition: Json) -> None:
    """Check what a teacher is told of an image. Raises KeyError, TypeError or ValueError."""
    kind = condition["kind"]
    whole = kind in CONDITIONS
    if kind == "class":
        whole = isinstance(condition["number"], int)
    elif kind == "prompt":
        whole = isinstance(condition["prompt"], str) and isinstance(condition["embedding_sha256"], str)
    if not whole:
        raise ValueError(f"condition {condition}")


def require_same(root: Path, found: Json, wanted: Json, where: str = "") -> None:
    """Raise CacheMismatchError naming the first field of `wanted` that a cache's recipe holds with another value."""
    for name, value in wanted.items():
        have: Any = found.get(name)
        if isinstance(value, dict) and isinstance(have, dict):
            require_same(root, have, value, f"{where}{name}.")
        elif have != value:
            raise CacheMismatchError(
                f"{root} holds a cache of another recipe: {where}{name} is {_short(have)} there, {_short(value)} was "
                "asked for; give the same options and images to resume it, or another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
