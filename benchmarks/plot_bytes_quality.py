"""Plot a student's loss against the bytes of its cache, from recorded results.

    python benchmarks/plot_bytes_quality.py [--size-experiment NAME] \
        [--online-experiment NAME] [--out DIR]

The left panel compares students of compressed caches with students of float16 features, from the
records in docs/results/student_vs_size. The right panel compares students of caches with 1, 2 or 4
noise draws with students whose teacher runs in the training loop, from the records in
docs/results/cached_vs_online. Each point is the mean over seeds of the paired difference of the MSE
on unseen images, with its 95 % interval (Student's t). The script writes bytes_quality-light.svg
and bytes_quality-dark.svg, and prints the points. It measures nothing.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from records import RESULTS, ROOT

from pipelines.sweep.statistics import difference

COLOURS = {"light": ("#1f2328", "#0969da"), "dark": ("#e6edf3", "#58a6ff")}
"""Colours of text and of points, by the background of the page."""
LABELS = {
    "10x": "10×",
    "50x": "50×",
    "100x": "100×",
    "1-draw": "1 draw",
    "2-draws": "2 draws",
    "4-draws": "4 draws",
    "mean-of-4": "mean of 4",
}


@dataclass(frozen=True)
class Point:
    """One arm: the size of its cache, and the paired differences of its students' MSE."""

    arm: str
    bytes_per_image: float
    differences: list[float]
    """In per cent, one per seed."""


def main() -> None:
    """Draw both panels for both backgrounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size-experiment",
        default="cifar10-narrow",
        help="folder of docs/results/student_vs_size [cifar10-narrow]",
    )
    parser.add_argument(
        "--online-experiment",
        default="cifar10-narrow-2000",
        help="folder of docs/results/cached_vs_online [cifar10-narrow-2000]",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs", help="folder of the two figures [docs]"
    )
    args = parser.parse_args()
    panels = {
        "against float16 features": size_points(RESULTS / "student_vs_size" / args.size_experiment),
        "against the online teacher": online_points(
            RESULTS / "cached_vs_online" / args.online_experiment
        ),
    }
    for title, points in panels.items():
        for point in points:
            size = f"{point.bytes_per_image:,.0f} bytes per image"
            print(f"{title}: {point.arm}, {size}, MSE {interval(point)}")
    for theme in COLOURS:
        draw(panels, theme, args.out / f"bytes_quality-{theme}.svg")


def results(folder: Path) -> dict[str, Any]:
    """Return the recorded results of an experiment by name."""
    return {path.stem: json.loads(path.read_text())["result"] for path in folder.glob("*.json")}


def paired_differences(runs: dict[str, Any], arm: str, baseline: str) -> list[float]:
    """Return the MSE differences from the baseline in per cent, for each seed with both runs."""
    seeds = sorted({name.split("-")[0] for name in runs if name.startswith("seed")})
    return [
        100 * (runs[f"{seed}-{arm}"]["mse"] / runs[f"{seed}-{baseline}"]["mse"] - 1)
        for seed in seeds
        if {f"{seed}-{arm}", f"{seed}-{baseline}"} <= runs.keys()
    ]


def size_points(folder: Path) -> list[Point]:
    """Return the points of the compressed caches; float16 is the baseline."""
    runs = results(folder)
    return [
        Point(arm, runs[f"cache-{arm}"]["bytes_per_image"], paired_differences(runs, arm, "fp16"))
        for arm in ("10x", "50x", "100x")
    ]


def online_points(folder: Path) -> list[Point]:
    """Return the points of caches of several noise draws; the online teacher is the baseline."""
    runs = {
        name.removeprefix("quality-"): result
        for name, result in results(folder).items()
        if name.startswith("quality-")
    }
    points = []
    for arm in ("1-draw", "mean-of-4", "2-draws", "4-draws"):
        sizes = [run["bytes_per_image"] for name, run in runs.items() if name.endswith(f"-{arm}")]
        differences = paired_differences(runs, arm, "online")
        points.append(Point(arm, statistics.mean(sizes), differences))
    return points


def interval(point: Point) -> str:
    """Return a point's mean difference with its interval, as text."""
    paired = difference(point.differences)
    return f"{paired.mean:+.2f} % [{paired.low:+.2f}, {paired.high:+.2f}]"


def draw(panels: dict[str, list[Point]], theme: str, path: Path) -> None:
    """Write one figure with a panel for each baseline."""
    ink, colour = COLOURS[theme]
    # A fixed salt and no date make the file a function of the points.
    with matplotlib.rc_context({"svg.hashsalt": "dtcache", "font.size": 10}):
        figure = Figure(figsize=(9, 3.3), layout="constrained")
        for axes, (title, points) in zip(
            figure.subplots(1, 2, sharey=True), panels.items(), strict=True
        ):
            draw_panel(axes, title, points, ink, colour)
        figure.axes[0].set_ylabel("MSE difference, %  (lower is better)", color=ink)
        figure.savefig(path, transparent=True, metadata={"Date": None})


def draw_panel(axes: Axes, title: str, points: list[Point], ink: str, colour: str) -> None:
    """Draw the points of one baseline over a logarithmic axis of bytes."""
    axes.axhline(0, color=ink, linewidth=0.8, linestyle="--")
    for point in points:
        paired = difference(point.differences)
        if paired.low is None or paired.high is None:
            raise SystemExit(f"{point.arm}: expected two seeds or more for an interval")
        # A mean of 4 draws takes as many bytes as 1 draw, so its point is moved to the left.
        moved = point.arm == "mean-of-4"
        x = point.bytes_per_image * (0.9 if moved else 1)
        axes.errorbar(
            x,
            paired.mean,
            yerr=[[paired.mean - paired.low], [paired.high - paired.mean]],
            fmt="s" if moved else "o",
            color=colour,
            capsize=4,
            markersize=5,
        )
        axes.annotate(
            LABELS[point.arm],
            (x, paired.mean),
            xytext=(-8 if moved else 8, 0),
            textcoords="offset points",
            ha="right" if moved else "left",
            va="center",
            color=ink,
        )
    axes.set_xscale("log")
    sizes = [point.bytes_per_image for point in points]
    axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
    ticks = sorted({round(size, -2) for size in sizes})
    axes.set_xticks(ticks, [f"{tick / 1000:g} kB" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(title, color=ink, fontsize=10)
    axes.set_xlabel("bytes of features per image", color=ink)
    axes.tick_params(colors=ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)


if __name__ == "__main__":
    main()
