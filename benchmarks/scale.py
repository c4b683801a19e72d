"""Measure how cost grows with a cache: write 1k to 100k images, open 1.28 million, start an epoch.

    python benchmarks/scale.py [--work runs/scale] [--rounds 3] [--results DIR]

The four taps of a CIFAR-10 teacher at 50 times, one view. The large cache's shards are hard links
to one shard of each array, so that it takes little disk: everything that opening and reading look
at (the index of 1.28 million samples, 1565 files, every shard's own index) is as large as it would
be. Memory is what a process of its own grows by.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import results_flag, write
from synthetic import (
    SMALL,
    begin_cache,
    features,
    fit_pyramid,
    names_of,
    shard_data,
    write_synthetic_cache,
)

from dtcache.cache.cache import Cache
from dtcache.cache.loader import Batching, EpochLoader
from dtcache.codec import FeatureEncoder, FittedTap

SHAPES = SMALL
COUNTS = (1_000, 10_000, 100_000)
LARGE = 1_281_167
SHARD_ROWS = 4096
BATCH = 256
DISTINCT = 64
PROBED = 20_000


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/scale"))
    parser.add_argument("--rounds", type=int, default=3)
    results_flag(parser)
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    begun = time.time()
    torch.set_num_threads(1)
    if asked.probe:
        print(json.dumps(probe(asked.probe)))
        return
    fit = fit_pyramid(SHAPES, 64, ratio=50.0)
    payloads = encode(fit)
    written: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(asked.rounds):
        for count in COUNTS:
            root = asked.work / f"{count}"
            shutil.rmtree(root, ignore_errors=True)
            started = time.process_time()
            write_synthetic_cache(root, SHAPES, fit, payload_of(payloads), count, 256)
            written[count].append(1e6 * (time.process_time() - started) / count)
    large = asked.work / "large"
    if not large.exists():
        write_linked(large, fit, payloads)
    probed = {str(count): probed_apart(asked.work / f"{count}") for count in COUNTS}
    result = {
        "write, CPU us an image": {
            str(count): round(statistics.median(times), 1) for count, times in written.items()
        },
        "read": {**probed, str(LARGE): probed_apart(large)},
    }
    print(json.dumps(result, indent=1))
    command = f"python benchmarks/scale.py --rounds {asked.rounds}"
    write(asked.results / "scale.json", command, result, time.time() - begun)


def encode(fit: dict[str, FittedTap]) -> dict[str, list[bytes]]:
    """Return a few payloads per tap; the rows share them."""
    encoder = FeatureEncoder(fit, torch.device("cpu"))
    shapes = enumerate(zip(names_of(SHAPES), SHAPES, strict=True))
    encoded = {
        name: encoder.encode(name, features(shape, DISTINCT, 1000 + i))
        for i, (name, shape) in shapes
    }
    return {name: [view.payload for view in views] for name, views in encoded.items()}


def payload_of(payloads: dict[str, list[bytes]]) -> Any:
    """Return the function from (array, row) to payload."""
    return lambda name, row: payloads[name][row % DISTINCT]


def write_linked(root: Path, fit: dict[str, FittedTap], payloads: dict[str, list[bytes]]) -> None:
    """Write a cache of LARGE rows whose full shards, all of which hold the same payloads, are links
    to the first.
    """
    writer = begin_cache(root, SHAPES, fit, LARGE, SHARD_ROWS)
    first, *middle, last = writer.missing
    for shard in (first, last):
        writer.write_shard(shard_data(writer, shard, payload_of(payloads)))
    record = writer._records[first]
    arrays = list(writer.manifest.arrays.values())
    for shard in middle:
        for array in arrays:
            os.link(root / array.object_path(first), root / array.object_path(shard))
        objects = [
            replace(o, path=a.object_path(shard))
            for o, a in zip(record.objects, arrays, strict=True)
        ]
        rows = arrays[0].rows_of(shard)
        writer._records[shard] = replace(
            record,
            shard=shard,
            objects=tuple(objects),
            content_sha256=tuple(f"{row:064x}" for row in rows),
        )
    writer.seal()


def probed_apart(root: Path) -> dict[str, float]:
    """Probe a cache in a process of its own."""
    command = [sys.executable, __file__, "--probe", str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def probe(root: Path) -> dict[str, float]:
    """Open a cache, start an epoch, and meet every shard; return seconds and bytes."""
    # Warm up the libraries and kernels on a cache of their own size.
    small = Cache(root.parent / str(COUNTS[0]))
    small.batch(np.arange(8), np.zeros(8), small.names)
    base = resident()
    started = time.perf_counter()
    cache = Cache(root)
    opened = time.perf_counter()
    memory_open = resident() - base
    rows = np.random.default_rng(0).permutation(
        np.arange(0, len(cache), max(1, len(cache) // PROBED))
    )
    for start in range(0, len(rows), BATCH):
        read(cache, rows[start : start + BATCH])
    memory_met = resident() - base - memory_open
    files = len(os.listdir("/proc/self/fd"))
    reading = time.process_time()
    for start in range(0, len(rows), BATCH):
        read(cache, rows[start : start + BATCH])
    epoch = len(cache) / len(rows) * (time.process_time() - reading)
    begun = time.perf_counter()
    batches = EpochLoader(
        cache, cache.reader.usable_rows, cache.names, Batching(batch_size=BATCH, seed=0, threads=1)
    ).epoch(0)
    next(batches)
    begun = time.perf_counter() - begun
    batches.close()
    return {
        "samples": len(cache),
        "files": len(cache.reader._objects),
        "open, s": round(opened - started, 3),
        "start of an epoch, s": round(begun, 3),
        "an epoch of features on one core, s": round(epoch, 2),
        "open and start, share of that epoch": round((opened - started + begun) / epoch, 4),
        "memory of the open cache, MB": round(memory_open / 1e6, 1),
        "memory after every shard was read from, MB more": round(memory_met / 1e6, 1),
        "of it a chunk, bytes": round(memory_met / len(cache) / len(cache.names), 1),
        "files held open": files,
    }


def read(cache: Cache, rows: np.ndarray) -> None:
    """Decode all taps of some rows."""
    cache.coefficients(rows, np.zeros_like(rows), cache.names)


def resident() -> int:
    """Return the bytes of this process in memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


if __name__ == "__main__":
    main()
