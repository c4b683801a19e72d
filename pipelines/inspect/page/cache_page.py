"""The page of a cache: what was asked, what is there, what it looks like, what it is worth."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from dtcache.cache.cache import Cache
from dtcache.options import InspectOptions
from dtcache.recipe import Json, tap_name
from dtcache.store.sample_index import NOT_YET
from pipelines.inspect.page.charts import (
    COLOURS,
    WIDTH,
    Series,
    bar_chart,
    heat_map,
    legend,
    line_chart,
)
from pipelines.inspect.page.gallery import galleries
from pipelines.inspect.page.render import write_page
from pipelines.inspect.statistics.compute import chosen_rows
from pipelines.inspect.statistics.remeasure import Afresh
from pipelines.inspect.tables import interval, number
from pipelines.terminal.text import byte_size

MOST_FAILURES = 50
ESTIMATES = (
    ("knn_top1", "k-NN accuracy", "high"),
    ("mean", "mean", ""),
    ("std", "std", "not near 0"),
    ("effective_rank", "effective rank", "high"),
    ("dead_channels", "dead channels", "near 0"),
    ("saturation", "saturation", "0"),
    ("escapes", "escapes", "under 0.001"),
    ("noise_share", "noise share", "under 1/3"),
    ("codec_error", "codec error", ""),
)
RECORDED = (
    ("determined_error", "lost of what the image determines", "under 1/3"),
    ("flip_error", "flip error", "under the noise share"),
    ("crop_error", "crop error", "under the noise share"),
)
"""Names in the report, titles, and what is good (docs/inspect.md)."""


def write_cache_page(
    root: Path, report: Json, options: InspectOptions, afresh: Afresh | None
) -> None:
    """Write the page of a cache whose report has its statistics. Raises ConfigError and DiskError."""
    assert options.report is not None, "asked where one is given"
    cache = Cache(root, options.images, allow="damage")
    statistics = report["statistics"]
    colours, segmented, worst = galleries(
        cache, chosen_rows(cache, options), options.gallery, afresh
    )
    write_page(
        options.report,
        "cache.html.j2",
        {
            "title": root.resolve().name,
            "report": report,
            "statistics": statistics,
            "names": [tap_name(tap["timestep"], tap["name"]) for tap in report["taps"]],
            "measures": _measures(report, statistics),
            "parts": _parts(report),
            "colours": colours,
            "segments": segmented,
            "worst": worst,
            "has_images": colours is None or any(row.photo is not None for row in colours.rows),
            "told_labels": report["recipe"]["teacher"].get("condition", {}).get("kind") == "label",
            "failures": _failures(cache),
            "most_failures": MOST_FAILURES,
            "recipe": json.dumps(report["recipe"], indent=1),
            **_charts(statistics),
        },
    )


def _parts(report: Json) -> list[tuple[str, int, float, str]]:
    """Return name, bytes, per cent and style of every part, features tap by tap."""
    named = [
        (
            tap_name(tap["timestep"], tap["name"]),
            tap["bytes"] - tap["codec_bytes"],
            f"c{place % COLOURS}",
        )
        for place, tap in enumerate(report["taps"])
    ]
    rest = ("codec", "images", "index", "other")
    named += [(name, report["parts"][name], f"g{place}") for place, name in enumerate(rest)]
    whole = max(1, report["bytes_on_disk"])
    return [(name, size, 100 * size / whole, style) for name, size, style in named]


def _measures(report: Json, statistics: Json) -> list[tuple[str, str, list[str]]]:
    """Return the rows of the table of taps: a title, what a good value is, and a text a tap."""
    taps = report["taps"]
    found = statistics["taps"]
    rows = [
        ("shape", "", [f"{tap['channels']}x{tap['height']}x{tap['width']}" for tap in taps]),
        ("bytes", "", [byte_size(tap["bytes"]) for tap in taps]),
        ("bits a value", "", [number(tap["bits_per_value"]) for tap in taps]),
    ]
    rows += [(title, good, [interval(tap[key]) for tap in found]) for key, title, good in ESTIMATES]
    if "afresh" in statistics:
        again = statistics["afresh"]["codec_error"]
        values = [interval(again[tap_name(tap["timestep"], tap["name"])]) for tap in taps]
        rows.append(("codec error, afresh", "as recorded", values))
    rows += [(title, good, [number(tap[key]) for tap in taps]) for key, title, good in RECORDED]
    return rows


def _failures(cache: Cache) -> list[tuple[str, str]]:
    """Return keys and reasons of the images that failed."""
    # What is not equal to null is null, which the filter drops: those that did not fail.
    failed = cache.samples.filter(pc.not_equal(cache.samples["failure"], NOT_YET))
    return list(zip(failed["key"].to_pylist(), failed["failure"].to_pylist(), strict=True))


def _charts(statistics: Json) -> dict[str, Any]:
    """Return the charts of statistics, by the template's name for them."""
    taps = statistics["taps"]
    names = [tap_name(tap["timestep"], tap["name"]) for tap in taps]
    styles = [f"c{i % COLOURS}" for i in range(len(taps))]
    edges = statistics["histogram_edges"]
    centres = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    width = edges[1] - edges[0]
    histograms = [
        Series(
            name=name,
            x=centres,
            y=[count / (max(1, sum(tap["histogram"])) * width) for count in tap["histogram"]],
            style=style,
        )
        for name, tap, style in zip(names, taps, styles, strict=True)
    ]
    measured = [
        (name, tap["knn_top1"]) for name, tap in zip(names, taps, strict=True) if tap["knn_top1"]
    ]
    charts: dict[str, Any] = {
        "histogram": line_chart(
            histograms,
            title="Histograms",
            x="whitened value",
            y="density",
            log_y=True,
            width=3 * WIDTH // 2,
        ),
        "histogram_legend": legend(histograms),
        "spectra": [
            _spectra(name, tap, style) for name, tap, style in zip(names, taps, styles, strict=True)
        ],
        "cka": heat_map(names, statistics["cka"]["value"], title="Linear CKA"),
        "knn": None,
        "noise": _bars(names, taps, "noise_share", "Noise share", "share of variance"),
        "rank": _bars(names, taps, "effective_rank", "Effective rank", "dimensions"),
        "error": _bars(names, taps, "codec_error", "Codec error", "share of variance"),
    }
    if measured:
        values = [(v["value"], v["low"], v["high"]) for _, v in measured]
        charts["knn"] = bar_chart(
            [name for name, _ in measured],
            values,
            title="k-NN accuracy",
            y="share of samples",
            line=statistics["knn_chance"],
            note=f"dashed: the most frequent label, {statistics['knn_chance']:.3f}",
        )
    return charts


def _bars(
    names: Sequence[str], taps: Sequence[Json], measure: str, title: str, y: str
) -> str | None:
    known = [(name, tap[measure]) for name, tap in zip(names, taps, strict=True) if tap[measure]]
    values = [(v["value"], v["low"], v["high"]) for _, v in known]
    return bar_chart([name for name, _ in known], values, title=title, y=y) if known else None


def _spectra(name: str, tap: Json, style: str) -> tuple[str, str] | None:
    """Return the spectrum of one array by spatial frequency and by principal component, with the water line."""
    found = tap["spectrum"]
    if found is None:
        return None
    charts = []
    for key, water, what, x, first in (
        ("rings", "water_rings", "frequency", "half cycles of the longer side", 0),
        ("components", "water_components", "component", "principal component", 1),
    ):
        places = [float(first + i) for i in range(len(found[key]))]
        lines = [Series(name=name, x=places, y=found[key], style=style)]
        if any(level is not None for level in found[water]):
            lines.append(Series(name="water line", x=places, y=found[water], style="water"))
        # What the codec dropped is zero but for rounding; it would stretch the axis over many decades.
        top = max(found[key], default=0.0)
        lines[0] = Series(
            name=name, x=places, y=[v if v > 1e-5 * top else None for v in found[key]], style=style
        )
        title = f"{name}, by {what}"
        charts.append(
            line_chart(lines, title=title, x=x, y="whitened variance", log_y=True, log_x=first == 1)
        )
    return charts[0], charts[1]
