"""The page of a cache: bytes, statistics, charts, galleries, failures, recipe."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from dtcache.cache.cache import Cache
from dtcache.options import InspectOptions
from dtcache.recipe import Json, tap_name
from dtcache.store.remote import Location
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
from pipelines.inspect.statistics.remeasure import Remeasured
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
    ("determined_error", "determined error", "under 1/3"),
    ("flip_error", "flip error", "under the noise share"),
    ("crop_error", "crop error", "under the noise share"),
)
"""Fields of the report, their titles on the page, and good values (docs/inspect.md)."""


def write_cache_page(
    out: Path, root: Location, report: Json, options: InspectOptions, remeasured: Remeasured | None
) -> None:
    """Write the page of a cache whose report has statistics to `out`.

    Raises ConfigError if the page would be too large, and DiskError.
    """
    cache = Cache(root, options.images, allow="damage", reading=options.reading)
    statistics = report["statistics"]
    rows = chosen_rows(cache, options)
    shown = galleries(cache, rows, options.gallery, remeasured)
    condition = report["recipe"]["teacher"].get("condition", {})
    write_page(
        out,
        "cache.html.j2",
        {
            "title": Path(str(cache.reader.location)).name,
            "report": report,
            "statistics": statistics,
            "names": [tap_name(tap["timestep"], tap["name"]) for tap in report["taps"]],
            "measures": _measures(report, statistics),
            "parts": _parts(report),
            "galleries": shown,
            "has_images": shown.features is None or any(row.photo for row in shown.features.rows),
            "sees_labels": condition.get("kind") == "label",
            "failures": _failures(cache),
            "most_failures": MOST_FAILURES,
            "recipe": json.dumps(report["recipe"], indent=1),
            **_charts(statistics),
        },
    )


def _parts(report: Json) -> list[tuple[str, int, float, str]]:
    """Return name, bytes, percent of all bytes and style of every part; features by tap."""
    parts = [
        (
            tap_name(tap["timestep"], tap["name"]),
            tap["bytes"],
            f"c{number % COLOURS}",
        )
        for number, tap in enumerate(report["taps"])
    ]
    others = ("codec", "images", "index", "other")
    parts += [(name, report["parts"][name], f"g{number}") for number, name in enumerate(others)]
    total = max(1, report["bytes_on_disk"])
    return [(name, size, 100 * size / total, style) for name, size, style in parts]


def _measures(report: Json, statistics: Json) -> list[tuple[str, str, list[str]]]:
    """Return the rows of the table of taps: a title, the range of good values, one text per tap."""
    taps = report["taps"]
    measured = statistics["taps"]
    rows = [
        ("shape", "", [f"{tap['channels']}x{tap['height']}x{tap['width']}" for tap in taps]),
        ("bytes", "", [byte_size(tap["bytes"]) for tap in taps]),
        ("bits per value", "", [number(tap["bits_per_value"]) for tap in taps]),
    ]
    rows += [
        (title, good, [interval(tap[key]) for tap in measured]) for key, title, good in ESTIMATES
    ]
    if "afresh" in statistics:
        remeasured = statistics["afresh"]["codec_error"]
        values = [interval(remeasured[tap_name(tap["timestep"], tap["name"])]) for tap in taps]
        rows.append(("codec error, remeasured", "as recorded", values))
    rows += [(title, good, [number(tap[key]) for tap in taps]) for key, title, good in RECORDED]
    return rows


def _failures(cache: Cache) -> list[tuple[str, str]]:
    """Return keys and reasons of the images that failed."""
    # Comparing null gives null, so the filter also drops the images that did not fail.
    failed = cache.samples.filter(pc.not_equal(cache.samples["failure"], NOT_YET))
    return list(zip(failed["key"].to_pylist(), failed["failure"].to_pylist(), strict=True))


def _charts(statistics: Json) -> dict[str, Any]:
    """Return the charts of the statistics by their name in the template."""
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
    knn = [
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
    if knn:
        values = [(v["value"], v["low"], v["high"]) for _, v in knn]
        charts["knn"] = bar_chart(
            [name for name, _ in knn],
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
    """Return one array's spectrum by spatial frequency and by component, with the water lines."""
    spectrum = tap["spectrum"]
    if spectrum is None:
        return None
    frequencies = [float(ring) for ring in range(len(spectrum["rings"]))]
    by_frequency = line_chart(
        _spectrum_lines(name, frequencies, spectrum["rings"], spectrum["water_rings"], style),
        title=f"{name}, by frequency",
        x="half cycles of the longer side",
        y="whitened variance",
        log_y=True,
    )
    components = [float(1 + number) for number in range(len(spectrum["components"]))]
    by_component = line_chart(
        _spectrum_lines(
            name, components, spectrum["components"], spectrum["water_components"], style
        ),
        title=f"{name}, by component",
        x="principal component",
        y="whitened variance",
        log_x=True,
        log_y=True,
    )
    return by_frequency, by_component


def _spectrum_lines(
    name: str,
    x: Sequence[float],
    variances: Sequence[float],
    water: Sequence[float | None],
    style: str,
) -> list[Series]:
    """Return the line of the variances and, if anything is coded, the codec's water line."""
    # Coefficients that the codec dropped are zero but for rounding, and would stretch the axis.
    least = 1e-5 * max(variances, default=0.0)
    lines = [Series(name=name, x=x, y=[v if v > least else None for v in variances], style=style)]
    if any(level is not None for level in water):
        lines.append(Series(name="water line", x=x, y=water, style="water"))
    return lines
