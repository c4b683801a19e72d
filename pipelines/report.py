"""What `dtcache inspect` shows: what was asked of a cache, what is there, whether it is complete. Never writes."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from dtcache.spec import FailedSample, Json, signal_to_noise, tap_name
from dtcache.store.commits import CodecSums, read_commits, total_sums
from dtcache.store.layout import CLUSTER_LOG, DATA, IMAGES, SAMPLES
from dtcache.store.manifest import CacheManifest, read_manifest
from dtcache.store.samples import damaged_objects, read_failures, read_objects


def inspect_cache(root: Path) -> Json:
    """Describe a cache, sealed or still being written, from its manifest and indices alone.

    Returns JSON values; bytes are as on disk, `ratio` leaves the stored images out. Raises CacheNotFoundError or
    CacheDamagedError.
    """
    manifest = read_manifest(root)
    failures, sums, shard_bytes, missing = _progress(root, manifest)
    files = {
        p.relative_to(root).as_posix(): p.stat().st_size
        for p in root.rglob("*")
        if p.is_file() and p.name != CLUSTER_LOG
    }
    recipe, count = manifest.recipe, manifest.num_samples
    done = count - missing - len(failures)
    image_bytes = shard_bytes.get(IMAGES, 0)
    stored = sum(files.values()) - image_bytes
    taps = [
        _tap(manifest, tap, t, files, shard_bytes, sums, done)
        for t in recipe["teacher"]["timesteps"]
        for tap in recipe["teacher"]["taps"]
    ]
    fp16 = sum(tap["channels"] * tap["height"] * tap["width"] for tap in taps) * 2 * manifest.num_views
    return {
        "complete": manifest.state == "sealed" and not missing,
        "num_images": count,
        "num_done": done,
        "num_failed": len(failures),
        "num_missing": missing,
        "num_views": manifest.num_views,
        "bytes_on_disk": sum(files.values()),
        "image_bytes": image_bytes,
        "codec_bytes": sum(size for path, size in files.items() if path.startswith(f"{DATA}/codec/")),
        "bytes_per_image": stored / done if done else None,
        "fp16_bytes_per_image": fp16,
        "ratio": fp16 * done / stored if done else None,
        "fingerprint": manifest.fingerprint,
        "timesteps": _timesteps(recipe),
        "taps": taps,
        "failures": dict(Counter(f.reason for f in failures).most_common()),
        "classes": manifest.classes,
        "recipe": recipe,
    }


def _progress(
    root: Path, manifest: CacheManifest
) -> tuple[list[FailedSample], dict[str, CodecSums], dict[str, int], int]:
    """Return failures, codec sums, bytes of shards by array, and rows that are not there."""
    if manifest.state == "sealed":
        objects = {path: size for path, size, _ in read_objects(root)}
        failures, sums = read_failures(root / SAMPLES), manifest.sums
    else:
        records = [record for _, record in sorted(read_commits(root).items())]
        objects = {o.path: o.size for record in records for o in record.objects}
        failures, sums = [f for record in records for f in record.failures], total_sums(records)
    damaged = damaged_objects(root, objects)
    sizes: Counter[str] = Counter()
    for path, size in objects.items():
        sizes[path.removeprefix(f"{DATA}/").rpartition("/")[0]] += 0 if path in damaged else size
    # A row is there when all its arrays are.
    whole = set(objects) - set(damaged)
    arrays = manifest.arrays.values()
    shards = range(next(iter(arrays)).num_shards)
    gone = [shard for shard in shards if not {a.object_path(shard) for a in arrays} <= whole]
    missing = {row for shard in gone for row in next(iter(arrays)).rows_of(shard)}
    return [f for f in failures if f.row not in missing], sums, dict(sizes), len(missing)


def _timesteps(recipe: Json) -> list[Json]:
    """Describe the noise at each timestep: round_trip is None where images are noised, snr where nothing is."""
    teacher, back = recipe["teacher"], recipe.get("round_trip") or {}
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
    follows = {error: (measured.get(error) or {}).get(name) for error in ("flip", "crop", "crop_interior")}
    return {
        "name": tap["name"],
        "stride": tap["stride"],
        "timestep": timestep,
        "channels": tap["channels"],
        "height": tap["height"],
        "width": tap["width"],
        "bytes": size,
        "bits_per_value": 8 * size / values if values else None,
        "relative_mse": met.squared_error / met.energy if met is not None and met.energy > 0 else None,
        "relative_mse_on_fit": manifest.num_samples == manifest.recipe["codec"]["fit_rows"],
        "noise_share": manifest.recipe["codec"]["noise_share"][name],
        "determined_error": manifest.recipe["codec"]["determined_error"][name],
        **{f"{error}_error": value for error, value in follows.items()},
    }


def render(report: Json, root: Path) -> RenderableType:
    """Return the report as narrow tables for a terminal."""
    recipe = report["recipe"]
    facts = Table(title=str(root), show_header=False, title_justify="left")
    state = "complete" if report["complete"] else f"INCOMPLETE: {report['num_missing']} images missing"
    rows = {
        "state": state,
        "images": f"{report['num_done']} done, {report['num_failed']} failed of {report['num_images']}",
        "views": _views(recipe),
        "encoding": _encoding(recipe),
        "view": f"{recipe['view']['height']}x{recipe['view']['width']}, {recipe['view']['fit']}",
        "codec": _codec(report),
        "teacher": f"{recipe['teacher']['architecture']} {recipe['teacher']['weights_sha256'][:12]}",
        **({"condition": _condition(recipe["teacher"]["condition"])} if "condition" in recipe["teacher"] else {}),
        "fingerprint": report["fingerprint"][:16],
        "on disk": f"{_size(report['bytes_on_disk'])} ({_size(report['image_bytes'])} images)",
        "an image": f"{_size(report['bytes_per_image'])} of features, {_size(report['fp16_bytes_per_image'])} in fp16",
        "ratio": f"{report['ratio']:.1f}x under fp16" if report["ratio"] else "-",
    }
    for name, value in rows.items():
        facts.add_row(name, value)
    for noise in report["timesteps"]:
        facts.add_row(f"t={noise['timestep']}", _noise(noise))
    taps = Table()
    for column in ("tap", "t", "shape", "bytes", "bits/value", "rel. MSE", "noise", "lost"):
        taps.add_column(column, justify="left" if column == "tap" else "right")
    for tap in report["taps"]:
        shape = f"{tap['channels']}x{tap['height']}x{tap['width']}"
        numbers = (_number(tap["bits_per_value"]), _number(tap["relative_mse"]), f"{tap['noise_share']:.0%}",
                   f"{tap['determined_error']:.0%}")  # fmt: skip
        taps.add_row(tap["name"], str(tap["timestep"]), shape, _size(tap["bytes"]), *numbers)
    failed = [f"{count} failed: {reason}" for reason, count in list(report["failures"].items())[:5]]
    return Group(facts, taps, *_equivariance(report), *failed)


def _equivariance(report: Json) -> list[RenderableType]:
    """Return a table of how far each tap is from following flips and crops, where that was measured."""
    measured = report["recipe"].get("equivariance")
    if measured is None:
        return []
    box = measured["box"]
    where = f", {box['height']}x{box['width']} crop at ({box['top']}, {box['left']})" if box else ", no crop fits"
    table = Table(
        title=f"equivariance: relative squared error, {measured['images']} images{where}", title_justify="left"
    )
    for column in ("tap", "t", "flip", "crop", "its middle"):
        table.add_column(column, justify="left" if column == "tap" else "right")
    for tap in report["taps"]:
        errors = (_number(tap[f"{name}_error"]) for name in ("flip", "crop", "crop_interior"))
        table.add_row(tap["name"], str(tap["timestep"]), *errors)
    return [table]


def _encoding(recipe: Json) -> str:
    """Say how an image becomes what the teacher sees."""
    steps = recipe["teacher"].get("ddim_steps")
    if steps is not None:
        return f"DDIM: inverted in {steps} steps"
    return "clean images" if set(recipe["teacher"]["alpha_bars"]) == {1.0} else "DDPM: noised"


def _noise(noise: Json) -> str:
    """Say how much signal is left at a timestep."""
    snr = "infinite" if noise["snr"] is None else f"{noise['snr']:.3g}"
    back = "" if noise["round_trip"] is None else f", round trip {noise['round_trip']:.1e}"
    return f"alpha-bar {noise['alpha_bar']:.4f}, SNR {snr}{back}"


def _codec(report: Json) -> str:
    """Say how features are stored and what the fit was made from and costs."""
    codec, fit = report["recipe"]["codec"], _size(report["codec_bytes"])
    if codec["ratio"] is None:
        return f"float16 (statistics of {codec['fit_rows']} images, {fit})"
    return f"{codec['ratio']:g}x aimed at, step {codec['step']:.3f} (fit of {codec['fit_rows']} images, {fit})"


def _condition(condition: Json) -> str:
    """Say what the teacher is told of an image."""
    if condition["kind"] == "prompt":
        return escape(f"prompt {condition['prompt']!r}")
    if condition["kind"] == "class":
        return f"class {condition['number']} for every image"
    return "the label of each image" if condition["kind"] == "label" else "no class (null)"


def _views(recipe: Json) -> str:
    """Say what the views of an image are."""
    draws, flips = recipe["draws"], "both flips" if recipe["flips"] else "no flip"
    if draws == 1:
        return flips
    return f"{flips}, mean of {draws} noise draws" if recipe["average"] else f"{flips} x {draws} noise draws"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _size(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
