"""Compare `cache.loader` with torch's DataLoader over the same cache, in images per second.

    python benchmarks/dataloader.py CACHE [--batch-size 64] [--workers 4] [--epochs 3]

Both yield decoded targets on the CPU. The DataLoader reads every view of a sample, the loader one;
the rate counts views. Passes alternate, so that a change of the machine's speed hits both.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from records import results_flag, write
from torch.utils.data import DataLoader

import dtcache
from dtcache.cache.cache import Cache


def loader_views(cache: Cache, batch_size: int, threads: int) -> Callable[[int], int]:
    """Return a pass of `cache.loader` over an epoch, which returns the number of views."""
    loader = cache.loader(batch_size=batch_size, threads=threads)

    def read(epoch: int) -> int:
        loader.set_epoch(epoch)
        return sum(len(next(iter(batch.targets.values()))) for batch in loader)

    return read


def worker_views(cache: Cache, batch_size: int, workers: int) -> Callable[[int], int]:
    """Return a pass of a DataLoader over the cache, which returns the number of views."""
    loader = DataLoader(
        cache,  # type: ignore[arg-type]
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def read(epoch: int) -> int:
        torch.manual_seed(epoch)
        return sum(next(iter(b.features.values())).flatten(0, 1).shape[0] for b in loader)

    return read


def main() -> None:
    """Measure the rates and their ratio per pass; print them and write dataloader.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    results_flag(parser)
    args = parser.parse_args()
    cache = dtcache.open(args.cache)
    begun = time.perf_counter()
    passes = {
        "loader": loader_views(cache, args.batch_size, args.workers),
        "dataloader": worker_views(cache, args.batch_size, args.workers),
    }
    rates: dict[str, list[float]] = {name: [] for name in passes}
    for epoch in range(args.epochs + 1):
        for name, read in passes.items():
            started = time.perf_counter()
            views = read(epoch)
            if epoch:  # the first pass compiles kernels, starts workers and hashes shards
                rates[name].append(views / (time.perf_counter() - started))
    ratios = [a / b for a, b in zip(rates["loader"], rates["dataloader"], strict=True)]
    result = {
        "views_per_second": rates,
        "loader_over_dataloader": ratios,
        "median_ratio": statistics.median(ratios),
        "workers": args.workers,
        "batch_size": args.batch_size,
    }
    print(json.dumps(result, indent=1))
    command = f"python benchmarks/dataloader.py CACHE --workers {args.workers}"
    write(args.results / "dataloader.json", command, result, time.perf_counter() - begun)


if __name__ == "__main__":
    main()
