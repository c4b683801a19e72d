"""Measure how the cost of a cache grows with its number of images, up to 1.28 million.

    python benchmarks/scale.py [--work runs/scale] [--rounds 3] [--results DIR]

The script writes caches of 1,000 to 100,000 images, and opens these and one of 1.28 million images.
The taps are those of a CIFAR-10 teacher at a ratio of 50, with one view. To save disk space, the
shards of the large cache are hard links to one shard per array. Only in the first shard are the
payloads' tags right, so features are read from that one. The index of 1.28 million samples, the
files, and the index of every shard have their real sizes. Memory is measured in a separate process,
as the increase of its anonymous resident memory. Results: docs/results/scale.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from records import results_flag, write
from synthetic import (
    SMALL,
    SyntheticCache,
    begin_cache,
    fit_pyramid,
    shard_data,
    synthetic_payloads,
    write_synthetic_cache,
)

from dtcache.cache.cache import Cache
from dtcache.cache.loader import Batching, EpochLoader
from dtcache.codec import TapCodec

Payload = Callable[[int], bytes]
"""A function from a row to the payload."""
SHAPES = SMALL
COUNTS = (1_000, 10_000, 100_000)
LARGE = 1_281_167
SHARD_ROWS = 4096
BATCH = 256
DISTINCT = 64
PROBED_ROWS = 20_000


def main() -> None:
    """Measure, print and record the costs, or probe one cache in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/scale"), help="folder of the caches [runs/scale]"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of writing [3]")
    results_flag(parser)
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    script_started = time.time()
    torch.set_num_threads(1)
    if args.probe:
        print(json.dumps(probe(args.probe)))
        return
    fit = fit_pyramid(SHAPES, 64, ratio=50.0)
    payloads = synthetic_payloads(fit, SHAPES, DISTINCT, 1000)

    def payload(row: int) -> bytes:
        return payloads[row % DISTINCT]

    write_us: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(args.rounds):
        for count in COUNTS:
            root = args.work / f"{count}"
            shutil.rmtree(root, ignore_errors=True)
            cache = SyntheticCache(shapes=SHAPES, fit=fit, rows=count, shard_rows=256)
            started = time.process_time()
            write_synthetic_cache(root, cache, payload)
            write_us[count].append(1e6 * (time.process_time() - started) / count)
    large = args.work / "large"
    if not large.exists():
        write_linked(large, fit, payload)
    roots = {**{count: args.work / f"{count}" for count in COUNTS}, LARGE: large}
    result = {
        "write_cpu_us_per_image": {
            str(count): round(statistics.median(times), 1) for count, times in write_us.items()
        },
        "read": {str(count): probe_in_process(root) for count, root in roots.items()},
    }
    print(json.dumps(result, indent=1))
    command = f"python benchmarks/scale.py --rounds {args.rounds}"
    write(args.results / "scale.json", command, result, time.time() - script_started)


def write_linked(root: Path, fit: Mapping[str, TapCodec], payload: Payload) -> None:
    """Write a cache of LARGE rows; all full shards are hard links to the first one."""
    cache = SyntheticCache(shapes=SHAPES, fit=fit, rows=LARGE, shard_rows=SHARD_ROWS)
    writer = begin_cache(root, cache)
    first, *middle, last = writer.missing
    for shard in (first, last):
        writer.write_shard(shard_data(writer, shard, payload))
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


def probe_in_process(root: Path) -> dict[str, float]:
    """Return the result of `probe` from a separate process."""
    command = [sys.executable, __file__, "--probe", str(root)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(process.stdout)
    return result


def probe(root: Path) -> dict[str, float]:
    """Open a cache, read from every shard, and start an epoch; return seconds and memory."""
    # The smallest cache warms up libraries and kernels.
    small = Cache(root.parent / str(COUNTS[0]))
    small.batch(np.arange(8), np.zeros(8, int), small.names)
    base = anonymous_memory()
    started = time.perf_counter()
    cache = Cache(root)
    opened = time.perf_counter()
    open_bytes = anonymous_memory() - base
    count = cache.samples.num_rows
    cache.will_need(np.arange(0, count, max(1, count // PROBED_ROWS)), cache.names)
    read_bytes = anonymous_memory() - base - open_bytes
    open_files = len(os.listdir("/proc/self/fd"))
    rows = np.random.default_rng(0).integers(0, min(count, cache.shard_rows), PROBED_ROWS)
    read(cache, rows[:BATCH])
    read_started = time.process_time()
    for start in range(0, len(rows), BATCH):
        read(cache, rows[start : start + BATCH])
    epoch_seconds = count / len(rows) * (time.process_time() - read_started)
    start = time.perf_counter()
    batches = EpochLoader(
        cache, cache.reader.usable_rows, cache.names, Batching(batch_size=BATCH, seed=0, threads=1)
    )
    batches.order(0).between(0, BATCH)
    read(cache, rows[:BATCH])
    start_seconds = time.perf_counter() - start
    open_seconds = opened - started
    return {
        "samples": cache.samples.num_rows,
        "files": len(cache.reader._objects),
        "open_s": round(open_seconds, 3),
        "epoch_start_s": round(start_seconds, 3),
        "epoch_cpu_s": round(epoch_seconds, 2),
        "open_and_start_over_epoch": round((open_seconds + start_seconds) / epoch_seconds, 4),
        "open_cache_mb": round(open_bytes / 1e6, 1),
        "additional_mb_after_reading": round(read_bytes / 1e6, 1),
        "additional_bytes_per_chunk": round(
            read_bytes / cache.samples.num_rows / len(cache.timesteps), 1
        ),
        "open_files": open_files,
    }


def read(cache: Cache, rows: np.ndarray) -> None:
    """Read the coefficients of all taps of some rows."""
    cache.coefficients(rows, np.zeros_like(rows), cache.names)


def anonymous_memory() -> int:
    """Return this process's resident memory in bytes, without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


if __name__ == "__main__":
    main()
