"""Bytes an image at equal distortion: the codec, its peers, and the Gaussian rate-distortion bound.

    python benchmarks/rate_distortion.py --data ../shared/data [--teacher DIR] [--timestep 50]

D = sum of squared errors / sum of squares about the per-channel means of the counted images, both over all whitened
features of all taps, so that a tap weighs as its variance. Features are those of benchmarks/features.py: whitened as
the codec does and rounded to fp16, one view an image; every codec gets the same. The table goes to
docs/results/rate_distortion.json and .png.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bound import band_variances, bound_bytes, energy_per_image
from counted import COUNTED, count_ours, flat_fits, leading, stored_bytes
from features import FeatureSet, adm_features, cifar10_features
from peers import bytes_at, peer_curves

from dtcache.codec.fit import TapStatistics, solve_step, tap_statistics
from pipelines.progress import track

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results" / "rate_distortion"
DISTORTIONS = (0.3, 0.1, 0.03, 0.01, 0.003)
RATIO = 50.0
SIZED = 48
OURS, BOUND = "dtcache", "Gaussian bound"


def main() -> None:
    """Measure both teachers, print the tables, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with cifar10-*.parquet and camvid [scenes for ADM alone]")
    parser.add_argument("--teacher", type=Path, default=ROOT / "benchmarks" / "teachers" / "cifar10")
    parser.add_argument("--timestep", type=int, default=50)
    parser.add_argument("--count", type=int, default=10_000, help="CIFAR-10 images counted")
    parser.add_argument("--peer-count", type=int, default=256, help="of these, how many the peers see")
    parser.add_argument("--adm-count", type=int, default=8, help="images that the ADM shape is fitted and counted on")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    started = time.time()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        if asked.data and asked.count:
            found = cifar10_features(Path(folder), asked.data, asked.teacher, asked.timestep, 256, asked.count)
            results["cifar10"] = measure(found, asked.peer_count, few=False)
        if asked.adm_count:
            found = adm_features(Path(folder), asked.data, asked.timestep, asked.adm_count, asked.adm_count)
            results["adm"] = measure(found, asked.adm_count, few=True)
    for result in results.values():
        print_table(result)
    write(results, time.time() - started)


def measure(features: FeatureSet, peer_count: int, few: bool) -> dict[str, Any]:
    """Return all codecs' bytes an image at every distortion; with few images the bound takes the fit's own PCA."""
    statistics = fit_statistics(features)
    maps = features.counted
    with track("bound", 1) as progress:
        variances = band_variances(maps, {n: s.basis for n, s in statistics.items()} if few else None)
        progress.advance()
    count = len(next(iter(maps.values())))
    energy = energy_per_image(maps)
    ours = [count_ours(fit, step, maps, energy) for step, fit in flat_fits(statistics, maps, energy, DISTORTIONS)]
    fp16 = sum(2 * values[0].size for values in maps.values())
    solved = solve_step(statistics, lambda fit: stored_bytes(fit, leading(maps, SIZED)), fp16 / RATIO)
    default = count_ours(solved.fit, solved.step, maps, energy)

    some = {name: values[:: max(1, count // peer_count)][:peer_count] for name, values in maps.items()}
    peers = peer_curves(some, energy_per_image(some))
    rows = {
        BOUND: [bound_bytes(variances, d) for d in DISTORTIONS],
        OURS: [bytes_at([o.point for o in ours], d) for d in DISTORTIONS],
    }
    for name, by_chunk in peers.items():
        found = [[b for points in by_chunk.values() if (b := bytes_at(points, d)) is not None] for d in DISTORTIONS]
        rows[name] = [min(values, default=None) for values in found]
    return {
        "about": features.about,
        "fp16_bytes": fp16,
        "images": count,
        "images_peers": len(next(iter(some.values()))),
        "distortions": DISTORTIONS,
        "bytes_per_image": rows,
        "default_at_50x": asdict(default),
        "settings": {
            OURS: [asdict(o) for o in ours],
            **{n: {f"{k} a chunk": [asdict(p) for p in v] for k, v in c.items()} for n, c in peers.items()},
        },
    }


def fit_statistics(features: FeatureSet) -> dict[str, TapStatistics]:
    """Fit every tap on its two draws."""
    statistics = {}
    with track("fit", len(features.fit)) as progress:
        for name, draws in features.fit.items():
            statistics[name] = tap_statistics(draws)
            progress.advance(1, name)
    return statistics


def print_table(result: dict[str, Any]) -> None:
    """Print bytes an image and, in brackets, how many times smaller than fp16 that is."""
    print(f"\n{result['about']}; fp16: {result['fp16_bytes']} bytes an image")
    print("| bytes an image (times smaller than fp16) at D = | " + " | ".join(f"{d:g}" for d in DISTORTIONS) + " |")
    print("|---" * (1 + len(DISTORTIONS)) + "|")
    for name, row in result["bytes_per_image"].items():
        cells = ["-" if b is None else f"{b:.0f} ({result['fp16_bytes'] / b:.1f})" for b in row]
        print(f"| {name} | " + " | ".join(cells) + " |")
    bound, ours = (result["bytes_per_image"][name] for name in (BOUND, OURS))
    print("| over the bound | " + " | ".join(f"{o / b:.2f}x" for o, b in zip(ours, bound, strict=True)) + " |")
    default = result["default_at_50x"]["point"]
    ratio = result["fp16_bytes"] / default["bytes_per_image"]
    print(f"default (noise-aware) fit: D = {default['distortion']:.4f} at {ratio:.1f}x")


def write(results: dict[str, Any], seconds: float) -> None:
    """Write the JSON beside machine, command and commit, and the plot."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    record = {
        "command": " ".join(["python", "benchmarks/rate_distortion.py", *sys.argv[1:]]),
        "seconds": round(seconds, 1),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} used",
        "commit": commit.stdout.strip(),
        "distortion": " ".join(__doc__.split("\n\n")[2].split()),
        "counted": COUNTED,
        "results": results,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(results, OUT.with_suffix(".png"))


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw bits a value against D, a panel a teacher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 4.5), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results.values(), strict=True):
        bits = 8 / (result["fp16_bytes"] / 2)
        for name, row in result["bytes_per_image"].items():
            kept = [(d, b * bits) for d, b in zip(DISTORTIONS, row, strict=True) if b is not None]
            style = {BOUND: "k--", OURS: "o-"}.get(name, ".:" if "lossless" in name else ".-")
            axes.plot(*zip(*kept, strict=True), style, label=name, linewidth=2.5 if name == OURS else 1.2)
        axes.set(xscale="log", yscale="log", xlabel="distortion D", ylabel="bits a value")
        axes.set_title(result["about"].split(":")[0], fontsize=10)
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
