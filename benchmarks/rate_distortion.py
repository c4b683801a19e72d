"""Bytes per image at equal distortion: the codec, its peers, and the Gaussian bound.

    python benchmarks/rate_distortion.py --data ../shared/data [--teacher DIR] [--timestep 50]

D = sum of squared errors / sum of squares about the per-channel means of the counted images. Both
sums run over all whitened features of all taps, so a tap is weighted by its variance. All codecs
get the same features, from benchmarks/features.py: whitened as by dtcache and rounded to fp16, one
view per image. The script writes docs/results/rate_distortion.md, .json and .png.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bound import band_variances, bound_bytes, energy_per_image
from counted import COUNTED, count_ours, flat_fits, leading, stored_bytes
from features import FeatureSet, adm_features, cifar10_features
from peers import bytes_at, bytes_near, peer_curves
from records import ROOT, commit, machine, results_flag

from dtcache.codec.fit import TapStatistics, solve_step, tap_statistics
from pipelines.terminal.progress import track

DISTORTIONS = (0.3, 0.1, 0.03, 0.01, 0.003)
RATIO = 50.0
SIZED = 48
OURS = "dtcache"
BOUND = "Gaussian bound"


def main() -> None:
    """Measure both teachers, print the tables, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder with cifar10-*.parquet and camvid [scenes for ADM alone]"
    )
    parser.add_argument(
        "--teacher", type=Path, default=ROOT / "benchmarks" / "teachers" / "cifar10"
    )
    parser.add_argument("--timestep", type=int, default=50)
    parser.add_argument("--count", type=int, default=10_000, help="CIFAR-10 images counted")
    parser.add_argument(
        "--peer-count", type=int, default=128, help="how many of these the peers are measured on"
    )
    parser.add_argument(
        "--adm-fit", type=int, default=8, help="images that the ADM shape's codec is fitted on"
    )
    parser.add_argument("--adm-count", type=int, default=4, help="images of the ADM shape counted")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes of one thread; 1: one teacher after the other",
    )
    results_flag(parser)
    asked = parser.parse_args()
    started = time.time()
    parts = [_cifar10] * bool(asked.data and asked.count) + [_adm] * bool(asked.adm_count)
    with ProcessPoolExecutor(
        asked.workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        results = {part.__name__.strip("_"): pool.submit(part, asked) for part in parts}
        found = {name: result.result() for name, result in results.items()}
    print("\n".join(line for result in found.values() for line in table(result)))
    names = ("timestep", "count", "peer_count", "adm_fit", "adm_count")
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(asked, name)}" for name in names)
    command = f"python benchmarks/rate_distortion.py --data DATA {flags}"
    write(asked.results, found, command, time.time() - started)


def _cifar10(asked: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = cifar10_features(
            Path(folder), asked.data, asked.teacher, asked.timestep, 256, asked.count
        )
        return measure(found, asked.peer_count, few=False)


def _adm(asked: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = adm_features(
            Path(folder), asked.data, asked.timestep, asked.adm_fit, asked.adm_count
        )
        return measure(found, max(2, asked.adm_count // 2), few=True)


def measure(features: FeatureSet, peer_count: int, few: bool) -> dict[str, Any]:
    """Return all codecs' bytes per image at every distortion.

    With few images the bound takes the fit's PCA, and band variances over the fit's views too: over
    the counted ones alone they would be too small in the logarithm.
    """
    statistics = fit_statistics(features)
    maps = features.counted
    with track("bound", 1) as progress:
        if few:
            pooled = {
                name: np.concatenate([*features.fit[name], values]) for name, values in maps.items()
            }
            variances = band_variances(pooled, {n: s.basis for n, s in statistics.items()})
        else:
            variances = band_variances(maps, None)
        progress.advance()
    count = len(next(iter(maps.values())))
    energy = energy_per_image(maps)
    ours = [
        count_ours(fit, step, maps, energy)
        for step, fit in flat_fits(statistics, maps, energy, DISTORTIONS)
    ]
    fp16 = sum(2 * values[0].size for values in maps.values())
    solved = solve_step(
        statistics, lambda fit: stored_bytes(fit, leading(maps, SIZED)), fp16 / RATIO
    )
    default = count_ours(solved.fit, solved.step, maps, energy)

    some = {
        name: values[:: max(1, count // peer_count)][:peer_count] for name, values in maps.items()
    }
    peers = peer_curves(some, energy_per_image(some))
    rows = {
        BOUND: [bound_bytes(variances, d) for d in DISTORTIONS],
        OURS: [bytes_near([o.point for o in ours], d) for d in DISTORTIONS],
    }
    for name, by_chunk in peers.items():
        found = [
            [b for points in by_chunk.values() if (b := bytes_at(points, d)) is not None]
            for d in DISTORTIONS
        ]
        rows[name] = [min(values, default=None) for values in found]
    return {
        "about": features.about,
        "processor_seconds": round(time.process_time(), 1),
        "fp16_bytes": fp16,
        "images": count,
        "images_peers": len(next(iter(some.values()))),
        "distortions": DISTORTIONS,
        "bytes_per_image": rows,
        "default_at_50x": asdict(default),
        "settings": {
            OURS: [asdict(o) for o in ours],
            **{
                n: {f"{k} a chunk": [asdict(p) for p in v] for k, v in c.items()}
                for n, c in peers.items()
            },
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


def table(result: dict[str, Any]) -> list[str]:
    """Return a Markdown table of bytes per image and, in brackets, how many times smaller than fp16
    that is.
    """
    fp16 = result["fp16_bytes"]
    rows = result["bytes_per_image"]
    seen = f"the peers were measured on {result['images_peers']} of the images counted"
    lines = [f"{result['about']}; {seen}. fp16: {fp16} bytes per image.", ""]
    lines += ["| bytes per image at D = | " + " | ".join(f"{d:g}" for d in DISTORTIONS) + " |"]
    lines += ["|---" * (1 + len(DISTORTIONS)) + "|"]
    for name, row in rows.items():
        cells = ["-" if b is None else f"{b:.0f} ({fp16 / b:.1f}x)" for b in row]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    over = (f"{ours / bound:.2f}" for ours, bound in zip(rows[OURS], rows[BOUND], strict=True))
    lines.append(f"| {OURS} / bound | " + " | ".join(over) + " |")
    peers = (
        min(row[i] for n, row in rows.items() if n not in (OURS, BOUND) and row[i])
        for i in range(len(rows[OURS]))
    )
    under = (f"{peer / ours:.1f}" for peer, ours in zip(peers, rows[OURS], strict=True))
    lines.append(f"| smallest peer / {OURS} | " + " | ".join(under) + " |")
    default = result["default_at_50x"]["point"]
    size = default["bytes_per_image"]
    lines += [
        "",
        f"The default fit, for students, has D = {default['distortion']:.3f} at {size:.0f} bytes.",
    ]
    return [*lines, ""]


def write(folder: Path, results: dict[str, Any], command: str, seconds: float) -> None:
    """Write the JSON beside machine, command and commit, and the plot."""
    record = {
        "command": command,
        "seconds": round(seconds, 1),
        "processor_seconds": {
            name: result.pop("processor_seconds") for name, result in results.items()
        },
        "machine": machine(),
        "commit": commit(),
        "distortion": " ".join(__doc__.split("\n\n")[2].split()),
        "counted": COUNTED,
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rate_distortion.json").write_text(json.dumps(record, indent=1) + "\n")
    head = [
        "# Bytes at equal distortion",
        "",
        f"`{record['command']}`: {record['distortion']}",
        "",
        COUNTED,
        "",
    ]
    lines = [line for result in results.values() for line in table(result)]
    (folder / "rate_distortion.md").write_text(
        "\n".join([*head, *lines, "![bits per value](rate_distortion.png)", ""])
    )
    plot(results, folder / "rate_distortion.png")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw bits per value against D, one panel per teacher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 4.5), layout="constrained")
    for axes, result in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.values(), strict=True
    ):
        bits = 8 / (result["fp16_bytes"] / 2)
        for name, row in result["bytes_per_image"].items():
            kept = [(d, b * bits) for d, b in zip(DISTORTIONS, row, strict=True) if b is not None]
            style = {BOUND: "k--", OURS: "o-"}.get(name, ".:" if "lossless" in name else ".-")
            axes.plot(
                *zip(*kept, strict=True), style, label=name, linewidth=2.5 if name == OURS else 1.2
            )
        axes.set(xscale="log", yscale="log", xlabel="distortion D", ylabel="bits a value")
        axes.set_title(result["about"].split(":")[0], fontsize=10)
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
