"""Measure bytes per image at equal distortion: dtcache's codec, other codecs, the Gaussian bound.

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
from codec_bytes import (
    COUNTED_BYTES,
    first_images,
    fits_at_distortions,
    measure_codec,
    stored_bytes,
)
from features import FeatureInputs, FeatureSet, adm_features, cifar10_features
from peers import bytes_at, bytes_near, peer_curves
from records import ROOT, commit, machine, results_flag

from dtcache.codec.fit import TapStatistics, solve_step, tap_statistics
from pipelines.terminal.progress import track

DISTORTIONS = (0.3, 0.1, 0.03, 0.01, 0.003)
RATIO = 50.0
"""Size of fp16 features over the size of the default fit."""
SIZE_IMAGES = 48
"""Images that the search for the default fit encodes."""
CIFAR10_FIT_IMAGES = 256
OURS = "dtcache"
BOUND = "Gaussian bound"


def main() -> None:
    """Measure both teachers, print the tables, write JSON, page and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with cifar10-*.parquet and camvid; without it, only ADM's shape is measured, "
        "on generated scenes",
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        default=ROOT / "benchmarks" / "teachers" / "cifar10",
        help="CIFAR-10 teacher [benchmarks/teachers/cifar10]",
    )
    parser.add_argument("--timestep", type=int, default=50, help="of both teachers [50]")
    parser.add_argument("--count", type=int, default=10_000, help="CIFAR-10 images counted [10000]")
    parser.add_argument(
        "--peer-count",
        type=int,
        default=128,
        help="CIFAR-10 images that the other codecs are measured on [128]",
    )
    parser.add_argument(
        "--adm-fit",
        type=int,
        default=8,
        help="images that the codec is fitted on for ADM's shape [8]",
    )
    parser.add_argument(
        "--adm-count", type=int, default=4, help="images counted for ADM's shape [4]"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes of one thread each; with 1, the teachers are measured in turn [2]",
    )
    results_flag(parser)
    args = parser.parse_args()
    started = time.time()
    measures = {}
    if args.data and args.count:
        measures["cifar10"] = _measure_cifar10
    if args.adm_count:
        measures["adm"] = _measure_adm
    with ProcessPoolExecutor(
        args.workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        futures = {name: pool.submit(task, args) for name, task in measures.items()}
        results = {name: future.result() for name, future in futures.items()}
    print("\n".join(line for result in results.values() for line in table(result)))
    names = ("timestep", "count", "peer_count", "adm_fit", "adm_count")
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in names)
    command = f"python benchmarks/rate_distortion.py --data DATA {flags}"
    write(args.results, results, command, time.time() - started)


def _measure_cifar10(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        inputs = FeatureInputs(
            spool=Path(folder),
            data=args.data,
            timestep=args.timestep,
            num_fit=CIFAR10_FIT_IMAGES,
            num_counted=args.count,
        )
        return measure(cifar10_features(inputs, args.teacher), args.peer_count, few=False)


def _measure_adm(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        inputs = FeatureInputs(
            spool=Path(folder),
            data=args.data,
            timestep=args.timestep,
            num_fit=args.adm_fit,
            num_counted=args.adm_count,
        )
        return measure(adm_features(inputs), max(2, args.adm_count // 2), few=True)


def measure(features: FeatureSet, peer_count: int, few: bool) -> dict[str, Any]:
    """Return the bytes per image of all codecs at every distortion.

    If `few`, the bound uses the fit's PCA, and band variances over the fit's images and the counted
    images together. Variances of a few images alone would make the bound too low.
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
        measure_codec(fit, step, maps, energy)
        for step, fit in fits_at_distortions(statistics, maps, energy, DISTORTIONS)
    ]
    fp16 = sum(2 * values[0].size for values in maps.values())
    solved = solve_step(
        statistics, lambda fit: stored_bytes(fit, first_images(maps, SIZE_IMAGES)), fp16 / RATIO
    )
    default = measure_codec(solved.fit, solved.step, maps, energy)

    peer_maps = {
        name: values[:: max(1, count // peer_count)][:peer_count] for name, values in maps.items()
    }
    peers = peer_curves(peer_maps, energy_per_image(peer_maps))
    rows = {
        BOUND: [bound_bytes(variances, d) for d in DISTORTIONS],
        OURS: [bytes_near([o.point for o in ours], d) for d in DISTORTIONS],
    }
    for name, by_chunk in peers.items():
        sizes = [
            [b for points in by_chunk.values() if (b := bytes_at(points, d)) is not None]
            for d in DISTORTIONS
        ]
        rows[name] = [min(values, default=None) for values in sizes]
    return {
        "about": features.about,
        "processor_seconds": round(time.process_time(), 1),
        "fp16_bytes": fp16,
        "images": count,
        "images_peers": len(next(iter(peer_maps.values()))),
        "distortions": DISTORTIONS,
        "bytes_per_image": rows,
        "default_at_50x": asdict(default),
        "settings": {
            OURS: [asdict(size) for size in ours],
            **{
                name: {
                    f"{images} per chunk": [asdict(point) for point in points]
                    for images, points in by_chunk.items()
                }
                for name, by_chunk in peers.items()
            },
        },
    }


def fit_statistics(features: FeatureSet) -> dict[str, TapStatistics]:
    """Return the codec's statistics of every tap, from its two noise draws."""
    statistics = {}
    with track("fit", len(features.fit)) as progress:
        for name, draws in features.fit.items():
            statistics[name] = tap_statistics(draws)
            progress.advance(1, name)
    return statistics


def table(result: dict[str, Any]) -> list[str]:
    """Return a Markdown table of bytes per image, with the ratio of fp16 to them in brackets."""
    fp16 = result["fp16_bytes"]
    rows = result["bytes_per_image"]
    peer_images = f"the peers were measured on {result['images_peers']} of the images counted"
    lines = [f"{result['about']}; {peer_images}. fp16: {fp16} bytes per image.", ""]
    lines += ["| bytes per image at D = | " + " | ".join(f"{d:g}" for d in DISTORTIONS) + " |"]
    lines += ["|---" * (1 + len(DISTORTIONS)) + "|"]
    for name, row in rows.items():
        cells = ["-" if b is None else f"{b:.0f} ({fp16 / b:.1f}x)" for b in row]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    ratios = (f"{ours / bound:.2f}" for ours, bound in zip(rows[OURS], rows[BOUND], strict=True))
    lines.append(f"| {OURS} / bound | " + " | ".join(ratios) + " |")
    smallest = (
        min(row[i] for n, row in rows.items() if n not in (OURS, BOUND) and row[i])
        for i in range(len(rows[OURS]))
    )
    ratios = (f"{peer / ours:.1f}" for peer, ours in zip(smallest, rows[OURS], strict=True))
    lines.append(f"| smallest peer / {OURS} | " + " | ".join(ratios) + " |")
    default = result["default_at_50x"]["point"]
    size = default["bytes_per_image"]
    lines += [
        "",
        f"The default fit, for students, has D = {default['distortion']:.3f} at {size:.0f} bytes.",
    ]
    return [*lines, ""]


def write(folder: Path, results: dict[str, Any], command: str, seconds: float) -> None:
    """Write the JSON file with command, machine and commit, the page, and the plot."""
    record = {
        "command": command,
        "seconds": round(seconds, 1),
        "processor_seconds": {
            name: result.pop("processor_seconds") for name, result in results.items()
        },
        "machine": machine(),
        "commit": commit(),
        "distortion": " ".join(__doc__.split("\n\n")[2].split()),
        "counted_bytes": COUNTED_BYTES,
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rate_distortion.json").write_text(json.dumps(record, indent=1) + "\n")
    head = [
        "# Bytes at equal distortion",
        "",
        f"`{record['command']}`: {record['distortion']}",
        "",
        COUNTED_BYTES,
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
            points = [(d, b * bits) for d, b in zip(DISTORTIONS, row, strict=True) if b is not None]
            style = {BOUND: "k--", OURS: "o-"}.get(name, ".:" if "lossless" in name else ".-")
            axes.plot(
                *zip(*points, strict=True),
                style,
                label=name,
                linewidth=2.5 if name == OURS else 1.2,
            )
        axes.set(xscale="log", yscale="log", xlabel="distortion D", ylabel="bits per value")
        axes.set_title(result["about"].split(":")[0], fontsize=10)
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
