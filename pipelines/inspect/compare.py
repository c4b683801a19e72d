"""Caches or runs side by side: the recipe or options that differ, and the results that differ."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from dtcache.recipe import Json
from dtcache.store.remote import Location
from pipelines.terminal.text import byte_size

DIGITS = 4


def differences(reports: Sequence[Json]) -> dict[str, list[object]]:
    """Return every field that differs, by dotted path: one value, or None, per report."""
    # If each cache has one timestep, taps are matched by name alone: T = 50 against T = 250.
    by_timestep = any(
        len(report["timesteps"]) > 1 for report in reports if report["kind"] == "cache"
    )
    fields = [_flat(_comparable(report, by_timestep)) for report in reports]
    names = list(dict.fromkeys(name for leaves in fields for name in leaves))
    by_name = {name: [leaves.get(name) for leaves in fields] for name in names}
    return {
        name: values
        for name, values in by_name.items()
        if any(value != values[0] for value in values)
    }


def render_differences(roots: Sequence[Location], reports: Sequence[Json]) -> RenderableType:
    """Return two narrow tables: the recipe or options that differ, and the results that differ."""
    differing = differences(reports)
    causes = {n: v for n, v in differing.items() if n.startswith(("recipe.", "options."))}
    results = {n: v for n, v in differing.items() if n not in causes}
    titles = short_paths(roots)
    return Group(
        _table("recipe and options", titles, causes),
        _table("content and results", titles, results),
    )


def _flat(value: Json, prefix: str = "") -> dict[str, object]:
    """Return a nested object's leaves by dotted path."""
    leaves: dict[str, object] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            leaves |= _flat(inner, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = inner
    return leaves


def _comparable(report: Json, by_timestep: bool) -> Json:
    """Return the fields of a report to compare: taps by name, without lists and hashes of files."""
    if report["kind"] == "run":
        results = report["results"] or {}
        return {
            "options": report["options"],
            "state": report["state"],
            "steps": report["steps"],
            "results": results,
        }
    kept = (
        "state",
        "num_images",
        "num_done",
        "num_failed",
        "num_views",
        "bytes_on_disk",
        "parts",
        "bytes_per_image",
        "fp16_bytes_per_image",
        "ratio",
    )
    measures = (
        "bytes",
        "bits_per_value",
        "relative_mse",
        "noise_share",
        "determined_error",
        "flip_error",
        "crop_error",
    )
    recipe = {
        name: value
        for name, value in report["recipe"].items()
        if name not in ("equivariance", "round_trip")
    }
    recipe["codec"] = {name: v for name, v in recipe["codec"].items() if not isinstance(v, dict)}
    recipe["teacher"] = recipe["teacher"] | {
        "taps": ", ".join(tap["name"] for tap in recipe["teacher"]["taps"])
    }
    taps: Json = {}
    for tap in report["taps"]:
        name = f"t{tap['timestep']}/{tap['name']}" if by_timestep else tap["name"]
        taps[name] = {measure: tap[measure] for measure in measures}
    for tap in report.get("statistics", {}).get("taps", []):
        name = f"t{tap['timestep']}/{tap['name']}" if by_timestep else tap["name"]
        # The values that extraction recorded are among `measures` already.
        recorded = {"codec_error", *(["noise_share"] if tap["noise_share_from"] == "fit" else [])}
        estimates = {
            key: value for key, value in tap.items() if isinstance(value, dict) and "value" in value
        }
        taps[name] |= {
            f"stats.{key}": estimate["value"]
            for key, estimate in estimates.items()
            if key not in recorded
        }
    return {"recipe": recipe, **{name: report[name] for name in kept}, "taps": taps}


def _table(title: str, titles: Sequence[str], rows: dict[str, list[object]]) -> RenderableType:
    if not rows:
        return f"{title}: nothing differs"
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for name in titles:
        table.add_column(name, justify="right", overflow="fold")
    for name, values in rows.items():
        shown = name.removeprefix("recipe.").removeprefix("options.")
        table.add_row(shown, *(text_of(name, value) for value in values))
    return table


def text_of(name: str, value: object) -> str:
    """Return the value of a field as readable text."""
    if value is None:
        return "-"
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and ("bytes" in name or name.startswith("parts."))
    ):
        return byte_size(value)
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    if isinstance(value, list):
        return ", ".join(text_of("", inner) for inner in value)
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def short_paths(roots: Sequence[Location]) -> list[str]:
    """Return the shortest ends of the paths that are different from each other."""
    parts = [Path(str(root)).parts for root in roots]
    for count in range(1, 1 + max(map(len, parts))):
        names = ["/".join(some[-count:]) for some in parts]
        if len(set(names)) == len(set(roots)):
            break
    return names
