"""What `dtcache inspect` knows of a cache from its manifest and its indices alone. Never writes."""

import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from dtcache.recipe import FailedSample, Json, signal_to_noise, tap_name
from dtcache.store.commits import CodecSums, read_commits, total_sums
from dtcache.store.label_summary import inspect_labels
from dtcache.store.layout import (
    CLUSTER_LOG,
    COMMITS,
    DATA,
    IMAGES,
    LABELS,
    MANIFEST,
    PROMPT,
    SAMPLES,
    SHARDS,
)
from dtcache.store.manifest import CacheManifest, look_at
from dtcache.store.sample_index import damaged_objects, read_failures, read_objects

INDEX = (MANIFEST, SAMPLES, SHARDS, PROMPT)
SCHEMA = 1
"""Version of the JSON that inspect prints (docs/inspect.md): fields may come under it, none may go or change."""


def inspect_cache(root: Path) -> Json:
    """Describe a cache, sealed or still being written, from its manifest and indices alone.

    Returns JSON values; bytes are as on disk, `ratio` leaves the stored images out. Raises CacheNotFoundError,
    CacheFormatError or CacheDamagedError.
    """
    return look_at(root, functools.partial(_describe, root))


def _describe(root: Path, manifest: CacheManifest) -> Json:
    failures, sums, shard_bytes, damaged, missing = _progress(root, manifest)
    files = _file_sizes(root)
    recipe = manifest.recipe
    count = manifest.num_samples
    done = count - missing - len(failures)
    parts = _parts(files, shard_bytes)
    stored = sum(files.values()) - parts["images"] - parts["labels"]
    taps = [
        _tap(manifest, tap, t, files, shard_bytes, sums, done)
        for t in recipe["teacher"]["timesteps"]
        for tap in recipe["teacher"]["taps"]
    ]
    fp16 = (
        sum(tap["channels"] * tap["height"] * tap["width"] for tap in taps) * 2 * manifest.num_views
    )
    complete = manifest.state == "sealed" and not missing
    return {
        "schema": SCHEMA,
        "kind": "cache",
        "state": "complete" if complete else "damaged" if damaged else "unfinished",
        "complete": complete,
        "num_images": count,
        "num_done": done,
        "num_failed": len(failures),
        "num_missing": missing,
        "num_views": manifest.num_views,
        "bytes_on_disk": sum(files.values()),
        "image_bytes": parts["images"],
        "codec_bytes": parts["codec"],
        "parts": parts,
        "bytes_per_image": stored / done if done else None,
        "fp16_bytes_per_image": fp16,
        "ratio": fp16 * done / stored if done else None,
        "fingerprint": manifest.fingerprint,
        "timesteps": _timesteps(recipe),
        "taps": taps,
        "failures": dict(Counter(f.reason for f in failures).most_common()),
        "damaged": damaged,
        "labels": inspect_labels(root, files, parts["coefficients"] + parts["codec"]),
        "classes": list(manifest.classes) if manifest.classes is not None else None,
        "recipe": recipe,
    }


def _file_sizes(root: Path) -> dict[str, int]:
    """Return bytes by path; files that a writer renames or removes meanwhile are passed over."""
    sizes = {}
    for path in root.rglob("*"):
        try:
            if path.is_file() and path.name != CLUSTER_LOG:
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
        except FileNotFoundError:
            continue
    return sizes


def _parts(files: Mapping[str, int], shard_bytes: Mapping[str, int]) -> dict[str, int]:
    """Split the bytes on disk by what they are for; the parts add up to all files."""
    parts = dict.fromkeys(("coefficients", "codec", "images", "index", "labels", "other"), 0)
    for path, size in files.items():
        if path.startswith(f"{LABELS}/"):
            parts["labels"] += size
        elif path.startswith(f"{DATA}/codec/"):
            parts["codec"] += size
        elif path in INDEX or path.startswith(f"{COMMITS}/"):
            parts["index"] += size
    parts["images"] = shard_bytes.get(IMAGES, 0)
    parts["coefficients"] = sum(size for name, size in shard_bytes.items() if name != IMAGES)
    # Zarr nodes, the log, and shards that are not committed or not whole.
    parts["other"] = sum(files.values()) - sum(parts.values())
    return parts


def _progress(
    root: Path, manifest: CacheManifest
) -> tuple[list[FailedSample], dict[str, CodecSums], dict[str, int], dict[str, str], int]:
    """Return failures, codec sums, bytes of shards by array, shards that are not as recorded, and rows not there."""
    if manifest.state == "sealed":
        objects = {path: size for path, size, _ in read_objects(root)}
        failures = read_failures(root / SAMPLES)
        sums = manifest.sums
    else:
        records = [record for _, record in sorted(read_commits(root).items())]
        objects = {o.path: o.size for record in records for o in record.objects}
        failures = [f for record in records for f in record.failures]
        sums = total_sums(records)
    damaged = damaged_objects(root, objects)
    sizes: Counter[str] = Counter()
    for path, size in objects.items():
        sizes[path.removeprefix(f"{DATA}/").rpartition("/")[0]] += 0 if path in damaged else size
    # A row is there when all its arrays are.
    whole = set(objects) - set(damaged)
    arrays = manifest.arrays.values()
    shards = range(manifest.num_shards)
    gone = [shard for shard in shards if not {a.object_path(shard) for a in arrays} <= whole]
    missing = {row for shard in gone for row in manifest.rows_of(shard)}
    return [f for f in failures if f.row not in missing], sums, dict(sizes), damaged, len(missing)


def _timesteps(recipe: Json) -> list[Json]:
    """Describe the noise at each timestep: round_trip is None where images are noised, snr where nothing is."""
    teacher = recipe["teacher"]
    back = recipe.get("round_trip") or {}
    return [
        {"timestep": t, "alpha_bar": a, "snr": signal_to_noise(a), "round_trip": back.get(f"t{t}")}
        for t, a in zip(teacher["timesteps"], teacher["alpha_bars"], strict=True)
    ]


def _tap(
    manifest: CacheManifest,
    tap: Json,
    timestep: int,
    files: Mapping[str, int],
    shard_bytes: Mapping[str, int],
    sums: Mapping[str, CodecSums],
    done: int,
) -> Json:
    """Describe one tap at one timestep; its bytes are its shards and its codec arrays."""
    name = tap_name(timestep, tap["name"])
    side = sum(size for path, size in files.items() if path.startswith(f"{DATA}/codec/{name}/"))
    size = shard_bytes.get(name, 0) + side
    values = tap["channels"] * tap["height"] * tap["width"] * manifest.num_views * done
    met = sums.get(name)
    measured = manifest.recipe.get("equivariance") or {}
    follows = {
        error: (measured.get(error) or {}).get(name) for error in ("flip", "crop", "crop_interior")
    }
    return {
        "name": tap["name"],
        "stride": tap["stride"],
        "timestep": timestep,
        "channels": tap["channels"],
        "height": tap["height"],
        "width": tap["width"],
        "bytes": size,
        "codec_bytes": side,
        "bits_per_value": 8 * size / values if values else None,
        "relative_mse": met.squared_error / met.energy
        if met is not None and met.energy > 0
        else None,
        "relative_mse_on_fit": manifest.num_samples == manifest.recipe["codec"]["fit_rows"],
        "noise_share": manifest.recipe["codec"]["noise_share"][name],
        "determined_error": manifest.recipe["codec"]["determined_error"][name],
        **{f"{error}_error": value for error, value in follows.items()},
    }
