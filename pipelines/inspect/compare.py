"""Caches or runs side by side: what differs in how they were made, and in what came of it."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from dtcache.recipe import Json
from pipelines.inspect.run_report import flat
from pipelines.terminal.text import byte_size

SHARED_TEXT = "nothing differs"
DIGITS = 4


def differences(reports: Sequence[Json]) -> dict[str, list[object]]:
    """Return every field that differs by dotted path, a value a report, None where one lacks it."""
    # By tap alone where each cache has one timestep, so that T = 50 stands beside T = 250.
    several = any(len(report["timesteps"]) > 1 for report in reports if report["kind"] == "cache")
    leaves = [flat(_comparable(report, several)) for report in reports]
    names = list(dict.fromkeys(name for found in leaves for name in found))
    values = {name: [found.get(name) for found in leaves] for name in names}
    return {
        name: found for name, found in values.items() if any(value != found[0] for value in found)
    }


def render_differences(roots: Sequence[Path], reports: Sequence[Json]) -> RenderableType:
    """Return narrow tables: how they were made, then what came of it."""
    found = differences(reports)
    made = {
        name: values for name, values in found.items() if name.startswith(("recipe.", "options."))
    }
    titles = short_paths(roots)
    return Group(
        _table("how they were made", titles, made),
        _table(
            "what came of it",
            titles,
            {name: values for name, values in found.items() if name not in made},
        ),
    )


def _comparable(report: Json, several: bool) -> Json:
    """Return what of a report says something beside another's: taps by name, no lists, no hashes of files."""
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
        name = f"t{tap['timestep']}/{tap['name']}" if several else tap["name"]
        taps[name] = {measure: tap[measure] for measure in measures}
    for tap in report.get("statistics", {}).get("taps", []):
        name = f"t{tap['timestep']}/{tap['name']}" if several else tap["name"]
        # What extraction recorded is there already.
        recorded = {"codec_error", *(["noise_share"] if tap["noise_share_from"] == "fit" else [])}
        estimates = {
            key: value for key, value in tap.items() if isinstance(value, dict) and "value" in value
        }
        found = {key: value["value"] for key, value in estimates.items() if key not in recorded}
        taps[name] = taps[name] | {f"stats.{key}": value for key, value in found.items()}
    return {"recipe": recipe, **{name: report[name] for name in kept}, "taps": taps}


def _table(title: str, titles: Sequence[str], rows: dict[str, list[object]]) -> RenderableType:
    if not rows:
        return f"{title}: {SHARED_TEXT}"
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for name in titles:
        table.add_column(escape(name), justify="right", overflow="fold")
    for name, values in rows.items():
        shown = name.removeprefix("recipe.").removeprefix("options.")
        table.add_row(escape(shown), *(escape(text_of(name, value)) for value in values))
    return table


def text_of(name: str, value: object) -> str:
    """Return a field's value for people."""
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


def short_paths(roots: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart."""
    for parts in range(1, 1 + max(len(root.parts) for root in roots)):
        names = ["/".join(root.parts[-parts:]) for root in roots]
        if len(set(names)) == len(set(roots)):
            break
    return names
