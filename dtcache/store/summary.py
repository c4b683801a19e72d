"""The description of a cache for `dtcache inspect`, from manifest, indices and file sizes alone.

Never writes. docs/inspect.md lists the fields.
"""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtcache.atomic_files import is_system_file, write_file
from dtcache.errors import CacheDamagedError, CacheError, StorageError
from dtcache.json_files import read_hashed_json
from dtcache.recipe import Json, array_of, signal_to_noise, tap_name
from dtcache.store.commits import CodecSums, ShardObject, read_commits, total_sums
from dtcache.store.label_sets import label_set_names, label_sets_among
from dtcache.store.layout import (
    CLUSTER_LOG,
    CODEC,
    COMMITS,
    DATA,
    FAILURES,
    IMAGES,
    LABELS,
    LOG,
    MANIFEST,
    MAX_LOG_BYTES,
    PROMPT,
    SAMPLES,
    SHARDS,
)
from dtcache.store.manifest import CacheManifest, look_at, read_manifest
from dtcache.store.remote import Location, RemoteCache, differing_objects, local_copy
from dtcache.store.sample_index import SampleIndex, read_samples, require_record
from dtcache.store.shard_index import damaged_objects, read_objects

INDEX = (MANIFEST, SAMPLES, FAILURES, SHARDS, PROMPT)
MAX_CLASSES = 1 << 18
"""Most classes that a description counts images of."""
SCHEMA = 1
"""Version of the JSON. Under one version fields may be added, but none removed or redefined."""


def inspect_cache(location: Location) -> Json:
    """Describe a cache, sealed or still being written, from its manifest and indices alone.

    Returns JSON values. Bytes are as on disk; `ratio` excludes the stored images and the label
    sets. Raises CacheNotFoundError, CacheFormatError or CacheDamagedError; for a cache in an object
    store also CacheIncompleteError if it is not sealed, and StorageError.
    """
    if isinstance(location, Path):
        return look_at(location, functools.partial(_describe, _Folder(location)))
    files = _ObjectStoreFolder(location)
    return _describe(files, read_manifest(files.root))


class _Files(Protocol):
    """The files of a cache."""

    root: Path
    """The folder with all files except, perhaps, the shards."""

    def sizes(self) -> dict[str, int]:
        """Return bytes by path."""

    def damaged(self, objects: Mapping[str, ShardObject]) -> dict[str, str]:
        """Return the shards that are missing or of another size, with a description."""

    def label_sets(self) -> list[str]:
        """Return the names of the label sets, in order."""

    def label_set(self, name: str) -> Path:
        """Return the folder of a label set, with its manifest and its sample index."""


class _Folder:
    """The files of a cache in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def sizes(self) -> dict[str, int]:
        return _file_sizes(self.root)

    def damaged(self, objects: Mapping[str, ShardObject]) -> dict[str, str]:
        return damaged_objects(self.root, objects)

    def label_sets(self) -> list[str]:
        return label_set_names(self.root)

    def label_set(self, name: str) -> Path:
        return self.root / LABELS / name


class _ObjectStoreFolder:
    """The files of a sealed cache in an object store, listed once."""

    def __init__(self, location: RemoteCache) -> None:
        self._location = location
        copy = local_copy(location)
        self.root = copy.root
        self._sizes = copy.store.sizes()
        if LOG in self._sizes:
            write_file(self.root / LOG, copy.store.read(LOG, MAX_LOG_BYTES))

    def sizes(self) -> dict[str, int]:
        return self._sizes

    def damaged(self, objects: Mapping[str, ShardObject]) -> dict[str, str]:
        return differing_objects(self._sizes, objects)

    def label_sets(self) -> list[str]:
        return label_sets_among(self._sizes)

    def label_set(self, name: str) -> Path:
        address = f"{self._location.address}/{LABELS}/{name}"
        return local_copy(replace(self._location, address=address)).root


@dataclass(frozen=True, kw_only=True, slots=True)
class _Progress:
    """The part of a cache that has been written so far."""

    failures: Mapping[str, int]
    """Failed rows of the shards that are present, by reason, the most frequent first."""
    sums: Mapping[str, CodecSums]
    """By tap: the codec's squared error, the energy, and the bytes of the sections."""
    shard_bytes: Mapping[str, int]
    """By array: bytes of the shard files that have their recorded size."""
    damaged: dict[str, str]
    """By path: shard files that are missing or of another size, with their actual size."""
    num_missing: int
    """Rows of the shards that at least one array lacks."""


def _describe(cache: _Files, manifest: CacheManifest) -> Json:
    root = cache.root
    samples = read_samples(root, manifest)
    progress = _progress(cache, manifest, samples)
    files = cache.sizes()
    recipe = manifest.recipe
    num_failed = sum(progress.failures.values())
    num_done = manifest.num_samples - progress.num_missing - num_failed
    parts = _parts(files, progress.shard_bytes)
    stored = sum(files.values()) - parts["images"] - parts["labels"]
    taps = [
        {
            "name": tap["name"],
            "stride": tap["stride"],
            "timestep": timestep,
            "channels": tap["channels"],
            "height": tap["height"],
            "width": tap["width"],
            **_tap_bytes(manifest, tap_name(timestep, tap["name"]), progress, num_done),
            **_tap_errors(manifest, tap_name(timestep, tap["name"]), progress.sums),
        }
        for timestep in recipe["teacher"]["timesteps"]
        for tap in recipe["teacher"]["taps"]
    ]
    values = sum(tap["channels"] * tap["height"] * tap["width"] for tap in taps)
    fp16 = 2 * values * manifest.num_views
    complete = manifest.state == "sealed" and not progress.num_missing
    return {
        "schema": SCHEMA,
        "kind": "cache",
        "state": "complete" if complete else "damaged" if progress.damaged else "unfinished",
        "complete": complete,
        "num_images": manifest.num_samples,
        "num_done": num_done,
        "num_failed": num_failed,
        "num_missing": progress.num_missing,
        "num_views": manifest.num_views,
        "bytes_on_disk": sum(files.values()),
        "image_bytes": parts["images"],
        "codec_bytes": parts["codec"],
        "parts": parts,
        "bytes_per_image": stored / num_done if num_done else None,
        "fp16_bytes_per_image": fp16,
        "ratio": fp16 * num_done / stored if num_done else None,
        "fingerprint": manifest.fingerprint,
        "timesteps": _timesteps(recipe),
        "taps": taps,
        "failures": dict(progress.failures),
        "damaged": progress.damaged,
        "labels": _label_sets(cache, files, parts["coefficients"] + parts["codec"]),
        "classes": list(manifest.classes) if manifest.classes is not None else None,
        "class_counts": _class_counts(samples, manifest),
        "source": _source(root),
        "recipe": recipe,
    }


def _class_counts(samples: SampleIndex, manifest: CacheManifest) -> dict[str, int] | None:
    """Return the images per class, failed ones too, by name or else number; None without labels.

    Only the first MAX_CLASSES classes are counted.
    """
    counts: Counter[int] = Counter()
    for table in samples.groups():
        for count in pc.value_counts(table["label"].drop_null()).to_pylist():
            counts[count["values"]] += count["counts"]
    names = manifest.classes or ()
    return {
        names[label] if 0 <= label < len(names) else str(label): counts[label]
        for label in sorted(counts)[:MAX_CLASSES]
    } or None


def _source(root: Path) -> Json | None:
    """Return what the extraction log says of the images; None without a log of this version."""
    try:
        log, _ = read_hashed_json(root / LOG, MAX_LOG_BYTES)
    except (OSError, ValueError):
        return None
    source = log.get("images")
    return source if isinstance(source, dict) else None


def _progress(cache: _Files, manifest: CacheManifest, samples: SampleIndex) -> _Progress:
    """Read the indices of a sealed cache, or the commit records of an unfinished one."""
    root = cache.root
    if manifest.state == "sealed":
        objects: Mapping[str, ShardObject] = read_objects(root, manifest)
        rows = samples.failed
        reasons = samples.take(rows)["failure"]
        sums = manifest.sums
    else:
        records = [record for _, record in sorted(read_commits(root).items())]
        for record in records:
            require_record(root, manifest, record)
        objects = {o.path: o for record in records for o in record.objects}
        failures = [f for record in records for f in record.failures]
        rows = np.array([f.row for f in failures], np.int64)
        reasons = pa.chunked_array([pa.array([f.reason for f in failures], pa.string())])
        sums = total_sums(records)
    damaged = cache.damaged(objects)
    shard_bytes: Counter[str] = Counter()
    for path, listed in objects.items():
        array = path.removeprefix(f"{DATA}/").rpartition("/")[0]
        shard_bytes[array] += 0 if path in damaged else listed.size
    # A row is present if its shard is intact in every array.
    intact = objects.keys() - damaged.keys()
    is_present = np.array(
        [
            all(array.object_path(shard) in intact for array in manifest.arrays.values())
            for shard in range(manifest.num_shards)
        ]
    )
    counts = pc.value_counts(reasons.filter(pa.array(is_present[rows // manifest.shard_rows])))
    by_reason = {c["values"]: c["counts"] for c in counts.to_pylist()}
    return _Progress(
        failures=dict(Counter(by_reason).most_common()),
        sums=sums,
        shard_bytes=shard_bytes,
        damaged=damaged,
        num_missing=sum(
            len(manifest.rows_of(shard)) for shard in np.flatnonzero(~is_present).tolist()
        ),
    )


def _file_sizes(root: Path) -> dict[str, int]:
    """Return bytes by path, without files that a writer renames or removes during the walk."""
    sizes = {}
    for path in root.rglob("*"):
        try:
            if path.is_file() and path.name != CLUSTER_LOG and not is_system_file(path.name):
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
        except FileNotFoundError:
            continue
    return sizes


def _parts(files: Mapping[str, int], shard_bytes: Mapping[str, int]) -> dict[str, int]:
    """Split the bytes on disk by purpose; the parts add up to all files."""
    parts = dict.fromkeys(("coefficients", "codec", "images", "index", "labels", "other"), 0)
    for path, size in files.items():
        if path.startswith(f"{LABELS}/"):
            parts["labels"] += size
        elif path == CODEC:
            parts["codec"] += size
        elif path in INDEX or path.startswith(f"{COMMITS}/"):
            parts["index"] += size
    parts["images"] = shard_bytes.get(IMAGES, 0)
    parts["coefficients"] = sum(size for name, size in shard_bytes.items() if name != IMAGES)
    # Zarr nodes, the log, and shards that are not committed or not intact.
    parts["other"] = sum(files.values()) - sum(parts.values())
    return parts


def _timesteps(recipe: Json) -> list[Json]:
    """Describe the noise at each timestep.

    `round_trip` is None unless images were encoded by DDIM inversion; `snr` is None without noise.
    """
    teacher = recipe["teacher"]
    round_trip = recipe.get("round_trip") or {}
    return [
        {
            "timestep": timestep,
            "alpha_bar": alpha_bar,
            "snr": signal_to_noise(alpha_bar),
            "round_trip": round_trip.get(f"t{timestep}"),
        }
        for timestep, alpha_bar in zip(teacher["timesteps"], teacher["alpha_bars"], strict=True)
    ]


def _tap_bytes(
    manifest: CacheManifest,
    name: str,
    progress: _Progress,
    num_done: int,
) -> Json:
    """Return the bytes of one tap in shards, and the bits per cached value.

    The taps of a timestep share shard files, which are divided in proportion to the taps' sections.
    """
    channels, height, width = manifest.tap_shapes[name]
    values = channels * height * width * manifest.num_views * num_done
    sections = {
        tap: sums.section_bytes
        for tap, sums in progress.sums.items()
        if array_of(tap) == array_of(name)
    }
    share = sections.get(name, 0) / max(1, sum(sections.values()))
    size = round(share * progress.shard_bytes.get(array_of(name), 0))
    return {
        "bytes": size,
        "bits_per_value": 8 * size / values if values else None,
    }


def _tap_errors(manifest: CacheManifest, name: str, sums: Mapping[str, CodecSums]) -> Json:
    """Return the measurements of one tap: the codec's errors, noise, equivariance."""
    codec = manifest.recipe["codec"]
    total = sums.get(name)
    relative_mse = None
    if total is not None and total.energy > 0:
        relative_mse = total.squared_error / total.energy
    equivariance = manifest.recipe.get("equivariance") or {}
    return {
        "relative_mse": relative_mse,
        "relative_mse_on_fit": manifest.num_samples == codec["fit_rows"],
        "noise_share": codec["noise_share"][name],
        "determined_error": codec["determined_error"][name],
        **{
            f"{change}_error": (equivariance.get(change) or {}).get(name)
            for change in ("flip", "crop", "crop_interior")
        },
    }


def _label_sets(cache: _Files, files: Mapping[str, int], feature_bytes: int) -> list[Json]:
    """Describe every label set from its manifest and the sizes of its files.

    `files` has the bytes of all files by path; `feature_bytes` is the size of the
    features. A set whose manifest is damaged or of a newer format has the state `damaged`, with the
    reason and no further fields.
    """
    label_sets = []
    for name in cache.label_sets():
        folder = f"{LABELS}/{name}/"
        size = sum(count for path, count in files.items() if path.startswith(folder))
        described = {
            "name": name,
            "bytes": size,
            "share": size / feature_bytes if feature_bytes else None,
        }
        try:
            described |= _label_set(cache.label_set(name))
        except (CacheError, StorageError) as error:
            described |= {"state": "damaged", "reason": str(error)}
        label_sets.append(described)
    return label_sets


def _label_set(root: Path) -> Json:
    """Describe one label set from its manifest and its sample index."""
    manifest = read_manifest(root)
    labels = manifest.recipe.get("labels")
    sealed = manifest.state == "sealed"
    if labels is None:
        raise CacheDamagedError(f"{root}: not a label set; delete this folder")
    measured = manifest.measured or {}
    return {
        "state": "complete" if sealed else "unfinished",
        "num_done": len(read_samples(root, manifest).usable) if sealed else None,
        "level": labels["level"],
        "classes": labels["classes"],
        "fingerprint": manifest.fingerprint,
        "interpreter": manifest.recipe["teacher"]["weights_sha256"],
        "validation": labels["validation"],
        **{name: measured.get(name) for name in ("total_variation", "entropy", "agreement")},
    }
