"""The page of a cache: what was asked, what is there, what it looks like, what it is worth."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtcache.cache import Cache
from dtcache.options import InspectOptions
from dtcache.spec import Json, tap_name
from dtcache.store.commits import read_commits
from dtcache.store.layout import SAMPLES
from dtcache.store.samples import read_failures
from pipelines.page.charts import COLOURS, Series, bar_chart, heat_map, legend, line_chart
from pipelines.page.gallery import galleries
from pipelines.page.write import write_page
from pipelines.statistics.afresh import Afresh
from pipelines.statistics.run import chosen_rows

MOST_FAILURES = 50


def write_cache_page(root: Path, report: Json, options: InspectOptions, afresh: Afresh | None) -> None:
    """Write the page of a cache whose report has its statistics. Raises ConfigError and DiskError."""
    assert options.report is not None, "asked where one is given"
    cache = Cache(root, options.images, allow="damage")
    statistics = report["statistics"]
    colours, segmented, worst = galleries(cache, chosen_rows(cache, options), options.gallery, afresh)
    write_page(
        options.report,
        "cache.html.j2",
        {
            "title": root.resolve().name,
            "report": report,
            "statistics": statistics,
            "taps": list(zip(report["taps"], statistics["taps"], strict=True)),
            "parts": _parts(report),
            "colours": colours,
            "segments": segmented,
            "worst": worst,
            "has_images": any(row.photo is not None for row in colours.rows),
            "told_labels": report["recipe"]["teacher"].get("condition", {}).get("kind") == "label",
            "failures": _failures(root, cache),
            "most_failures": MOST_FAILURES,
            "recipe": json.dumps(report["recipe"], indent=1),
            **_charts(statistics),
        },
    )


def _parts(report: Json) -> list[tuple[str, int, float, str]]:
    """Return name, bytes, per cent and style of every part, features tap by tap."""
    named = [(f"{tap_name(t['timestep'], t['name'])}", t["bytes"] - t["codec_bytes"]) for t in report["taps"]]
    named += [(name, report["parts"][name]) for name in ("codec", "images", "index", "other")]
    whole = max(1, report["bytes_on_disk"])
    return [(name, size, 100 * size / whole, f"c{i % COLOURS}") for i, (name, size) in enumerate(named)]


def _failures(root: Path, cache: Cache) -> list[tuple[str, str]]:
    if cache.reader.manifest.state == "sealed":
        failed = read_failures(root / SAMPLES)
    else:
        failed = [f for record in read_commits(root).values() for f in record.failures]
    return [(f.key, f.reason) for f in failed]


def _charts(statistics: Json) -> dict[str, Any]:
    """Return the charts of statistics, by the template's name for them."""
    taps = statistics["taps"]
    names = [tap_name(tap["timestep"], tap["name"]) for tap in taps]
    styles = [f"c{i % COLOURS}" for i in range(len(taps))]
    edges = statistics["histogram_edges"]
    centres = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    width = edges[1] - edges[0]
    histograms = [
        Series(name=name, x=centres, y=[count / (max(1, sum(tap["histogram"])) * width) for count in tap["histogram"]],
               style=style)
        for name, tap, style in zip(names, taps, styles, strict=True)
    ]  # fmt: skip
    measured = [(name, tap["knn_top1"]) for name, tap in zip(names, taps, strict=True) if tap["knn_top1"]]
    charts: dict[str, Any] = {
        "histogram": line_chart(histograms, title="Histograms of whitened values", x="value", y="density", log_y=True),
        "histogram_legend": legend(histograms),
        "spectra": [_spectra(name, tap, style) for name, tap, style in zip(names, taps, styles, strict=True)],
        "cka": heat_map(names, statistics["cka"]["value"], title="Linear CKA between taps and timesteps"),
        "knn": None,
        "noise": _bars(names, taps, "noise_share", "Noise share", "share of variance"),
        "rank": _bars(names, taps, "effective_rank", "Effective rank", "dimensions"),
        "error": _bars(names, taps, "codec_error", "Codec error", "share of variance"),
    }
    if measured:
        values = [(v["value"], v["low"], v["high"]) for _, v in measured]
        charts["knn"] = bar_chart(
            [name for name, _ in measured], values, title="k-NN accuracy of pooled features", y="share of samples",
            line=statistics["knn_chance"],
        )  # fmt: skip
    return charts


def _bars(names: Sequence[str], taps: Sequence[Json], measure: str, title: str, y: str) -> str | None:
    known = [(name, tap[measure]) for name, tap in zip(names, taps, strict=True) if tap[measure]]
    values = [(v["value"], v["low"], v["high"]) for _, v in known]
    return bar_chart([name for name, _ in known], values, title=title, y=y) if known else None


def _spectra(name: str, tap: Json, style: str) -> tuple[str, str] | None:
    """Return the spectrum of one array by spatial frequency and by principal component, with the water line."""
    found = tap["spectrum"]
    if found is None:
        return None
    charts = []
    for key, water, x in (("rings", "water_rings", "spatial frequency (ring)"),
                          ("components", "water_components", "principal component")):  # fmt: skip
        places = [float(i + 1) for i in range(len(found[key]))]
        lines = [Series(name=name, x=places, y=found[key], style=style)]
        if any(level is not None for level in found[water]):
            lines.append(Series(name="water line", x=places, y=found[water], style="water"))
        # What the codec dropped is zero but for rounding; it would stretch the axis over many decades.
        top = max(found[key], default=0.0)
        lines[0] = Series(name=name, x=places, y=[v if v > 1e-5 * top else None for v in found[key]], style=style)
        charts.append(line_chart(lines, title=name, x=x, y="variance", log_y=True, log_x=key == "components"))
    return charts[0], charts[1]
