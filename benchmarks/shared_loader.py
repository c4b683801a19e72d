"""Time of several narrow students that share one loader, against the same students in turn.

    python benchmarks/shared_loader.py [--work runs/shared_loader] [--count 4] [--epochs 2] \
        [--rounds 3] [--results DIR]

The cache is synthetic: SMALL pyramids (see synthetic.py) at 50 times, taps at strides 2, 4 and 8,
black images of 32 px. The students differ in their learning rate alone. Each of them is a whole run
of `train`, with evaluation, checkpoints and export. One round times both ways; their order
alternates. The ratio is the median over rounds of (in turn / shared), in CPU and in wall seconds.

Results: docs/results/shared_loader.json.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from records import results_flag, write
from synthetic import (
    SMALL,
    SyntheticCache,
    fit_pyramid,
    synthetic_payloads,
    write_synthetic_cache,
)

from dtcache.options import TrainOptions
from pipelines.train.train import train, train_shared

RATIO = 50.0
DISTINCT = 64
"""Distinct maps; the cache's rows repeat them."""
ROWS = 1024
SHARD_ROWS = 64
NETWORKS = ("mobilenetv3_small_050", "resnet10t")
Runs = list[tuple[Path, TrainOptions]]


def main() -> None:
    """Make the cache if it is missing, measure every network, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/shared_loader"))
    parser.add_argument("--count", type=int, default=4, help="students [4]")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of each run [2]")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of timings [3]")
    results_flag(parser)
    args = parser.parse_args()
    cache = args.work / "cache"
    if not cache.exists():
        make_cache(cache)
    begun = time.perf_counter()
    result = {network: measure(args, cache, network) for network in NETWORKS}
    for network, measured in result.items():
        print(
            f"{network}: {args.count} students in turn take {measured['cpu_ratio']:.2f} times the "
            f"CPU seconds and {measured['wall_ratio']:.2f} times the wall seconds of one loader"
        )
    command = (
        f"python benchmarks/shared_loader.py --count {args.count} --epochs {args.epochs} "
        f"--rounds {args.rounds}"
    )
    write(args.results / "shared_loader.json", command, result, time.perf_counter() - begun)


def make_cache(root: Path) -> None:
    """Write the cache."""
    fit = fit_pyramid(SMALL, DISTINCT, RATIO)
    payloads = synthetic_payloads(fit, SMALL, DISTINCT, 1000)
    cache = SyntheticCache(shapes=SMALL, fit=fit, rows=ROWS, shard_rows=SHARD_ROWS)
    write_synthetic_cache(root, cache, lambda row: payloads[row % DISTINCT])


def measure(args: argparse.Namespace, cache: Path, network: str) -> dict[str, Any]:
    """Return the seconds of both ways in every round, and the medians of their ratios."""

    def in_turn(runs: Runs) -> None:
        for out, options in runs:
            train([cache], out, options)

    def shared(runs: Runs) -> None:
        train_shared([cache], runs)

    ways = {"in turn": in_turn, "shared": shared}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(args.rounds):
        names = list(ways) if number % 2 == 0 else list(reversed(ways))
        for name in names:
            seconds[name].append(timed(ways[name], runs_of(args, network)))
    pairs = list(zip(seconds["in turn"], seconds["shared"], strict=True))
    return {
        "students": args.count,
        "seconds": seconds,
        **{
            f"{clock}_ratio": statistics.median(one[clock] / other[clock] for one, other in pairs)
            for clock in ("cpu", "wall")
        },
    }


def runs_of(args: argparse.Namespace, network: str) -> Runs:
    """Return the runs, in new folders."""
    out = args.work / "runs"
    shutil.rmtree(out, ignore_errors=True)
    return [
        (
            out / f"lr{number}",
            TrainOptions(
                student=network,
                student_size="32",
                fpn_width=32,
                taps="2,4,8",
                loss="mse",
                lr=1e-3 * (number + 1),
                epochs=args.epochs,
                batch_size=128,
                device="cpu",
                log_with="none",
            ),
        )
        for number in range(args.count)
    ]


def timed(way: Callable[[Runs], None], runs: Runs) -> dict[str, float]:
    """Return the CPU and wall seconds of one way to train the runs."""
    cpu = time.process_time()
    wall = time.perf_counter()
    way(runs)
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


if __name__ == "__main__":
    main()
