"""The manifest: the recipe of a cache, its files' hashes, and whether all files are there."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from dtcache.atomic_files import write_file
from dtcache.errors import (
    CacheDamagedError,
    CacheError,
    CacheFormatError,
    CacheMismatchError,
    CacheNotFoundError,
    one_line,
)
from dtcache.hashing import canonical_json, sha256_json
from dtcache.json_files import read_hashed_json, with_own_hash
from dtcache.recipe import FORMAT_VERSION, Json, Recipe, array_of, tap_name
from dtcache.store.commits import CodecSums, CommitRecord
from dtcache.store.layout import IMAGES, MANIFEST, PayloadArray
from dtcache.store.parquet_tables import TablePart
from dtcache.store.validate import check_manifest

T = TypeVar("T")

MAX_MANIFEST_BYTES = 64 << 20
MAX_BYTES_PER_VALUE = 4
HEADER_BYTES = 2048
"""Bounds of an image or a tap: a value's code has up to 27 bits; an image may have a container."""
SAME = "pass the same options and images to resume it, or a different `out`"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheManifest:
    """A cache's recipe as JSON, and the hashes of its files.

    Nothing in a manifest depends on time, path, host or number of workers.
    """

    state: Literal["writing", "sealed"]
    recipe: Json
    """`Recipe.to_json()`. It stays JSON, so that fields of a later version survive."""
    fingerprint: str
    arrays: dict[str, PayloadArray]
    classes: tuple[str, ...] | None
    """Class names by class index."""
    files: dict[str, str]
    """SHA-256 by path of every file except shards and logs: zarr.json, codec, Parquet, prompt."""
    samples: tuple[TablePart, ...]
    """The parts of samples.parquet: its row groups, then its footer."""
    sums: dict[str, CodecSums]
    """Codec error and bytes by tap, over all shards; empty until sealed."""
    measured: Json | None = None
    """The measurements of `dtcache label write` on a sealed label set (docs/format.md)."""

    def to_json(self) -> Json:
        """Return the manifest as JSON values, with its own hash."""
        body: Json = {
            "format": FORMAT_VERSION,
            "state": self.state,
            "recipe": self.recipe,
            "fingerprint": self.fingerprint,
            "arrays": {
                n: {"shape": list(a.shape), "shard_rows": a.shard_rows}
                for n, a in self.arrays.items()
            },
            "classes": list(self.classes) if self.classes is not None else None,
            "files": self.files,
            "samples": [asdict(part) for part in self.samples],
            "sums": {n: asdict(s) for n, s in self.sums.items()},
        }
        if self.measured is not None:
            body["measured"] = self.measured
        return with_own_hash(body)

    def sealed(
        self,
        files: dict[str, str],
        samples: tuple[TablePart, ...],
        sums: dict[str, CodecSums],
        measured: Json | None = None,
    ) -> "CacheManifest":
        """Return the manifest of the finished cache, with the hashes of new and changed files."""
        return replace(
            self,
            state="sealed",
            files={**self.files, **files},
            samples=samples,
            sums=sums,
            measured=measured,
        )

    @property
    def identity(self) -> str:
        """SHA-256 of the manifest. Once sealed, the manifest covers the recipe and every file."""
        return sha256_json(self.to_json())

    @property
    def tap_names(self) -> list[str]:
        """Names of the taps, timestep by timestep, finest tap first."""
        return list(self.tap_shapes)

    @property
    def tap_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of the features by tap, in the order of `tap_names`."""
        teacher = self.recipe["teacher"]
        shapes = {
            tap["name"]: (tap["channels"], tap["height"], tap["width"]) for tap in teacher["taps"]
        }
        return {
            tap_name(t, tap): shape for t in teacher["timesteps"] for tap, shape in shapes.items()
        }

    @property
    def num_samples(self) -> int:
        """Rows of the cache."""
        return int(self.recipe["num_samples"])

    @property
    def shard_rows(self) -> int:
        """Rows per shard, the same for every array; the last shard may have fewer."""
        return int(self.recipe["shard_rows"])

    @property
    def num_shards(self) -> int:
        """Shards of the cache: every array has as many."""
        return -(-self.num_samples // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Return the rows that a shard holds, the same for every array."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.num_samples))

    def record_problem(self, record: CommitRecord) -> str | None:
        """Return why a commit record is not one of this cache's shards, or None if it is."""
        paths = [array.object_path(record.shard) for array in self.arrays.values()]
        if record.fingerprint != self.fingerprint or [o.path for o in record.objects] != paths:
            return "the record belongs to another cache"
        rows = self.rows_of(record.shard)
        if not 0 <= record.shard < self.num_shards or len(record.content_sha256) != len(rows):
            return f"expected {len(rows)} rows, got {len(record.content_sha256)}"
        for failed in record.failures:
            if failed.row not in rows:
                return (
                    f"expected failures of rows {rows.start} to {rows.stop - 1}, got row "
                    f"{failed.row}"
                )
        return None

    @property
    def num_views(self) -> int:
        """Views per row: draws x flips, or flips if draws are averaged.

        The number of a view is draw x flips + flip.
        """
        return (1 if self.recipe["average"] else int(self.recipe["draws"])) * (
            2 if self.recipe["flips"] else 1
        )

    def is_mirrored(self, view: int) -> bool:
        """Return whether a view shows the mirrored image."""
        return bool(self.recipe["flips"]) and view % 2 == 1


def new_manifest(
    recipe: Recipe,
    arrays: dict[str, PayloadArray],
    classes: list[str] | None,
    files: dict[str, str],
    samples: tuple[TablePart, ...],
) -> CacheManifest:
    """Return the manifest of a cache that has no shards yet."""
    return CacheManifest(
        state="writing",
        recipe=recipe.to_json(),
        fingerprint=recipe.fingerprint,
        arrays=arrays,
        classes=tuple(classes) if classes is not None else None,
        files=files,
        samples=samples,
        sums={},
    )


def write_manifest(root: Path, manifest: CacheManifest) -> None:
    """Write the manifest atomically. Raises DiskError."""
    write_file(root / MANIFEST, canonical_json(manifest.to_json()))


def read_manifest(root: Path) -> CacheManifest:
    """Read and check a manifest.

    Raises CacheNotFoundError if there is none, CacheDamagedError if its bytes are not those that
    were written, and CacheFormatError if an older or newer dtcache wrote it.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise CacheNotFoundError(
            f"{root} is not a cache: expected {MANIFEST} in it; pass a folder made by dtcache "
            "extract"
        )
    try:
        value, whole = read_hashed_json(path, MAX_MANIFEST_BYTES)
        version = value["format"]
        if version != FORMAT_VERSION or isinstance(version, bool):
            is_old = type(version) is int and version < FORMAT_VERSION
            fix = "extract again" if is_old else "install the dtcache that wrote it, or a newer one"
            raise CacheFormatError(
                f"{path}: expected format {FORMAT_VERSION}, got {str(version)[:40]}; {fix}"
            )
        if not whole:
            raise CacheDamagedError(
                f"{path}: its own checksum does not match; restore it from a copy or extract again"
            )
        arrays = check_manifest(value)
        manifest = CacheManifest(
            state=value["state"],
            recipe=value["recipe"],
            fingerprint=value["fingerprint"],
            arrays=arrays,
            classes=tuple(value["classes"]) if value["classes"] is not None else None,
            files=value["files"],
            samples=tuple(
                TablePart(bytes=part["bytes"], sha256=part["sha256"]) for part in value["samples"]
            ),
            sums={
                n: CodecSums(**{f.name: s[f.name] for f in fields(CodecSums)})
                for n, s in value["sums"].items()
            },
            measured=value.get("measured"),
        )
        _check_arrays(manifest)
        return manifest
    except CacheError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CacheDamagedError(
            f"{path}: not a manifest of dtcache ({one_line(error)}); extract again"
        ) from error


def look_at(root: Path, look: Callable[[CacheManifest], T]) -> T:
    """Return `look(manifest)` of a cache; `look` is called again if the cache was sealed meanwhile.

    Sealing removes the commit records and changes the sample index, so a first call during a seal
    may fail. Raises what `look` raises.
    """
    manifest = read_manifest(root)
    try:
        result = look(manifest)
    except CacheDamagedError:
        again = read_manifest(root)
        if again.state == manifest.state:
            raise
    else:
        again = manifest if manifest.state == "sealed" else read_manifest(root)
        if again.state == manifest.state:
            return result
    return look(again)


def _check_arrays(manifest: CacheManifest) -> None:
    """Check that the payload arrays are those of the recipe, and no larger than their values need.

    Raises ValueError.
    """
    rows = manifest.num_samples
    views = manifest.num_views
    shard_rows = manifest.recipe["shard_rows"]
    view = manifest.recipe["view"]
    most: dict[str, int] = {}
    for name, shape in manifest.tap_shapes.items():
        bound = MAX_BYTES_PER_VALUE * math.prod(shape) + HEADER_BYTES
        most[array_of(name)] = most.get(array_of(name), 0) + bound
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(most, (rows, views))
    if manifest.recipe["store_images"]:
        expected[IMAGES] = (rows,)
        most[IMAGES] = MAX_BYTES_PER_VALUE * 3 * view["height"] * view["width"] + HEADER_BYTES
    shapes = {name: array.shape[:-1] for name, array in manifest.arrays.items()}
    if shapes != expected or {array.shard_rows for array in manifest.arrays.values()} != {
        shard_rows
    }:
        raise ValueError(
            f"arrays that are not those of {rows} samples, {views} views and {shard_rows} rows per "
            "shard"
        )
    for name, array in manifest.arrays.items():
        if array.length > most[name]:
            raise ValueError(
                f"array {name}: expected payloads of at most {most[name]} bytes, got {array.length}"
            )


def require_same(
    root: Path, found: Json, wanted: Json, where: str = "", remedy: str = SAME
) -> None:
    """Raise CacheMismatchError with the first field of `wanted` that differs in `found`.

    `found` is the recipe of the cache at `root`, `wanted` the recipe of this run.
    """
    for name, value in wanted.items():
        have: Any = found.get(name)
        if isinstance(value, dict) and isinstance(have, dict):
            require_same(root, have, value, f"{where}{name}.", remedy)
        elif have != value:
            raise CacheMismatchError(
                f"{root} holds a cache of another recipe: {where}{name} is {_short(have)} in "
                f"the cache, {_short(value)} in this run; {remedy}"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
