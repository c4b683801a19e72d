"""Measure what comparing each shard file with its SHA-256 costs in the first epoch.

    python benchmarks/shard_hash.py [--work runs/shard_hash] [--rows 40000] [--results DIR]

A synthetic cache of a CIFAR-10 teacher's taps is read for one epoch in batches of 256, with two
reading threads, by fresh readers: with the comparison and, as the control, without it. Rounds are
interleaved. Cold rounds begin without the files in the page cache.

Each row has the CPU seconds and the wall seconds of the epoch, and the wall seconds up to the first
batch, as medians over the rounds. `step_ms` is the time that a consumer sleeps per batch, in place
of a training step on another device: reading ahead then hides what fits into it.

Results: docs/results/shard_hash.json.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from records import results_flag, write
from synthetic import (
    SMALL,
    SyntheticCache,
    fit_pyramid,
    synthetic_payloads,
    write_synthetic_cache,
)

from dtcache.cache.cache import Cache
from dtcache.cache.loader import Batching, EpochLoader
from dtcache.store import shard_check

RATIO = 16.0
DISTINCT = 256
SHARD_ROWS = 256
BATCH = 256
THREADS = 2


def main() -> None:
    """Write the cache, measure it, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/shard_hash"), help="scratch folder")
    parser.add_argument("--rows", type=int, default=40_000, help="rows of the cache [40000]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per setting [3]")
    parser.add_argument("--step-ms", type=float, default=100.0, help="step of the consumer [100]")
    results_flag(parser)
    flags = parser.parse_args()
    begun = time.time()
    shutil.rmtree(flags.work, ignore_errors=True)
    root = flags.work / "cache"
    write_samples(root, flags.rows)
    files = [path for path in (root / "data.zarr").rglob("c.*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    read_epoch(root, "full", 0.0)  # compiles the kernels
    settings = [
        (shuffle, cold, step)
        for shuffle in ("full", "block")
        for cold in (False, True)
        for step in (0.0, flags.step_ms / 1000)
    ]
    rows = []
    for shuffle, cold, step in settings:
        rounds: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for _ in range(flags.rounds):
            for hashing in (True, False):
                if cold:
                    drop_pages(files)
                with nullified(hashing):
                    rounds[hashing].append(read_epoch(root, shuffle, step))
        for hashing, measured in rounds.items():
            medians = {
                name: round(statistics.median(one[name] for one in measured), 2)
                for name in measured[0]
            }
            rows.append(
                {
                    "shuffle": shuffle,
                    "cold": cold,
                    "step_ms": 1000 * step,
                    "hashing": hashing,
                    **medians,
                }
            )
            print(rows[-1], flush=True)
    result = {
        "cache_mb": round(size / 1e6, 1),
        "shard_files": len(files),
        "rows": flags.rows,
        "sha256_mb_per_cpu_second": round(sha256_rate(files, size), 1),
        "epochs": rows,
    }
    command = f"python benchmarks/shard_hash.py --rows {flags.rows} --rounds {flags.rounds}"
    write(flags.results / "shard_hash.json", command, result, time.time() - begun)
    shutil.rmtree(flags.work)


def write_samples(root: Path, rows: int) -> None:
    """Write a cache whose rows repeat `DISTINCT` encoded samples."""
    fit = fit_pyramid(SMALL, 256, RATIO)
    payloads = synthetic_payloads(fit, SMALL, DISTINCT, 200)
    cache = SyntheticCache(shapes=SMALL, fit=fit, rows=rows, shard_rows=SHARD_ROWS)
    write_synthetic_cache(root, cache, lambda row: payloads[row % DISTINCT])


@contextmanager
def nullified(hashing: bool) -> Iterator[None]:
    """Leave out the comparison of shard files unless `hashing` is set."""
    if hashing:
        yield
        return
    with mock.patch.object(shard_check, "shard_difference", lambda *_: None):
        yield


def read_epoch(root: Path, shuffle: str, step: float) -> dict[str, float]:
    """Open the cache and read an epoch, sleeping `step` seconds per batch."""
    cpu = time.process_time()
    wall = time.perf_counter()
    cache = Cache(root)
    batching = Batching(batch_size=BATCH, seed=0, threads=THREADS, shuffle=shuffle)
    first = None
    for _ in EpochLoader(cache, cache.reader.usable_rows, cache.names, batching).epoch(0):
        first = first or time.perf_counter() - wall
        time.sleep(step)
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "first_batch_s": first or 0.0,
    }


def sha256_rate(files: list[Path], size: int) -> float:
    """Return the megabytes of warm files that one core hashes per CPU second."""
    cpu = time.process_time()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")
    return size / 1e6 / (time.process_time() - cpu)


def drop_pages(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
