"""Measure what opening a cache and starting a block shuffle cost at 100 million images.

    python benchmarks/scale_index.py [--work runs/scale_index] [--samples 100000000] [--results DIR]

The sample index, the failed rows (one in 100,000), the shard index and the number of files are real
in size; keys have 19 characters, and content hashes are random. The taps are those of a CIFAR-10
teacher at a ratio of 50, with one view. The shards that the first mix of epoch 0
reads are real; all others are hard links to one file, whose payloads' tags are of another place.
Memory is the increase of the anonymous resident memory of a separate process, and its peak is of
the whole process. The first batch is read and decoded as `dtcache train --shuffle block` reads it,
without images. Results: docs/results/scale_index.json.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from records import results_flag, write
from scale import DISTINCT, SHAPES, SHARD_ROWS, anonymous_memory
from synthetic import SyntheticCache, fit_pyramid, synthetic_payloads, write_synthetic_cache

from dtcache.cache.cache import Cache
from dtcache.cache.loader import Batching, EpochLoader
from dtcache.cache.order import MIXED_BLOCKS
from dtcache.cache.selection import split_rows
from dtcache.hashing import canonical_json, file_sha256
from dtcache.json_files import with_own_hash
from dtcache.row_set import RowSet
from dtcache.store.commits import ShardObject
from dtcache.store.layout import FAILURES, IMAGES, MANIFEST, SAMPLES, SHARDS
from dtcache.store.manifest import read_manifest
from dtcache.store.parquet_tables import GROUP_ROWS, WRITING, parquet_bytes, parts_of
from dtcache.store.sample_index import SCHEMA, Keys, failures_table
from dtcache.store.shard import build_shard
from dtcache.store.shard_index import shards_table

BATCH = 256
FAILED_EVERY = 100_000


def main() -> None:
    """Write the cache if it is not there, probe it in a separate process, and record the costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/scale_index"))
    parser.add_argument("--samples", type=int, default=100_000_000)
    results_flag(parser)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.probe:
        print(json.dumps(probe(args.work)))
        return
    started = time.time()
    if not (args.work / MANIFEST).is_file():
        write_index(args.work, args.samples)
    command = [sys.executable, __file__, "--probe", "--work", str(args.work)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(process.stdout)
    print(json.dumps(result, indent=1))
    shown = f"python benchmarks/scale_index.py --samples {args.samples}"
    write(args.results / "scale_index.json", shown, result, time.time() - started)


def write_index(root: Path, count: int) -> None:
    """Write a cache of two shards, and enlarge its manifest and indices to `count` samples."""
    shutil.rmtree(root, ignore_errors=True)
    fit = fit_pyramid(SHAPES, 64, ratio=50.0)
    payloads = synthetic_payloads(fit, SHAPES, DISTINCT, 1000)
    small = SyntheticCache(shapes=SHAPES, fit=fit, rows=2 * SHARD_ROWS, shard_rows=SHARD_ROWS)
    write_synthetic_cache(root, small, lambda row: payloads[row % DISTINCT])
    (root / MANIFEST).rename(root / f"{MANIFEST}.small")
    value = json.loads((root / f"{MANIFEST}.small").read_bytes())
    del value["sha256"]
    value["recipe"]["num_samples"] = count
    for array in value["arrays"].values():
        array["shape"][0] = count
    failed = []
    with pq.ParquetWriter(root / SAMPLES, SCHEMA, **WRITING) as writer:
        for table in sample_groups(count):
            writer.write_table(table, row_group_size=GROUP_ROWS)
            failed.append(failures_table(table))
    with (root / SAMPLES).open("rb") as file:
        value["samples"] = [{"bytes": p.bytes, "sha256": p.sha256} for p in parts_of(file)]
    (root / FAILURES).write_bytes(parquet_bytes(pa.concat_tables(failed)))
    (root / MANIFEST).write_bytes(canonical_json(with_own_hash(value)))
    manifest = read_manifest(root)
    failed_rows = np.arange(0, count, FAILED_EVERY)
    rows = RowSet.all_but(count, failed_rows, failed_rows + 1)
    train, _ = split_rows(rows, [])
    order = loader_of(root, train, SHARD_ROWS)._block_order(0)
    real = set((order.mix(0)[0] // SHARD_ROWS).tolist())
    listed = []
    for shard in range(manifest.num_shards):
        for array in manifest.arrays.values():
            path = root / array.object_path(shard)
            sha256 = None
            if array.name != IMAGES and (shard in real or shard == manifest.num_shards - 1):
                contents = [payloads[row % DISTINCT] for row in array.rows_of(shard)]
                path.unlink(missing_ok=True)
                path.write_bytes(build_shard(array, shard, contents))
                sha256 = file_sha256(path)
            elif shard > 0:
                path.unlink(missing_ok=True)
                os.link(root / array.object_path(0), path)
            sha256 = sha256 or hashlib.sha256(f"{array.name} {shard}".encode()).hexdigest()
            o = ShardObject(path=array.object_path(shard), size=path.stat().st_size, sha256=sha256)
            listed.append((shard, o))
    (root / SHARDS).write_bytes(parquet_bytes(shards_table(listed)))
    for name in (SAMPLES, SHARDS, FAILURES):
        value["files"][name] = file_sha256(root / name)
    (root / MANIFEST).write_bytes(canonical_json(with_own_hash(value)))
    (root / f"{MANIFEST}.small").unlink()


def loader_of(cache: object, rows: RowSet, shard_rows: int) -> EpochLoader:
    """Return the loader of a block shuffle; only the order needs no open cache."""
    source = cache if isinstance(cache, Cache) else _Rows(shard_rows)
    batching = Batching(batch_size=BATCH, seed=0, threads=1, shuffle="block")
    return EpochLoader(source, rows, [], batching)


class _Rows:
    """The layout of a cache that is not written yet."""

    num_views = 1

    def __init__(self, shard_rows: int) -> None:
        self.shard_rows = shard_rows


def sample_groups(count: int) -> Iterator[pa.Table]:
    """Yield the sample index in row groups; one row in FAILED_EVERY failed."""
    rng = np.random.default_rng(0)
    for first in range(0, count, GROUP_ROWS):
        rows = np.arange(first, min(first + GROUP_ROWS, count))
        shuffled = pa.array((rows * 7919) % (10 * count) + 10**11).cast(pa.string())
        keys = pc.binary_join_element_wise("images/", shuffled, "")
        content = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), len(rows), [None, pa.py_buffer(rng.bytes(32 * len(rows)))]
        )
        failure = pa.array(np.where(rows % FAILED_EVERY == 0, "broken", None), pa.string())
        labels = pa.array((rows % 1000).astype(np.int32))
        columns = [pa.array(rows), keys, labels, content, failure]
        yield pa.Table.from_arrays(columns, schema=SCHEMA)


def probe(root: Path) -> dict[str, float]:
    """Open a cache, order an epoch and read its first batch; return seconds and memory."""
    base = anonymous_memory()
    base_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [(time.perf_counter(), time.process_time())]

    def lap() -> dict[str, float]:
        times.append((time.perf_counter(), time.process_time()))
        (wall, cpu), (now, cpu_now) = times[-2:]
        return {"s": round(now - wall, 2), "cpu_s": round(cpu_now - cpu, 2)}

    result: dict[str, object] = {}
    cache = Cache(root)
    result["open"] = lap()
    result["open_mb"] = round((anonymous_memory() - base) / 1e6, 1)
    usable = cache.reader.usable
    train, held = split_rows(usable, Keys(cache.reader.samples.keys, usable))
    order = loader_of(cache, train, cache.shard_rows).order(0)
    rows, views = order.between(0, BATCH)
    result["split_and_order"] = lap()
    values, _ = cache.coefficients(rows, views, cache.names)
    cache.decoder(cache.names)(values)
    cache.reader.samples.keys(rows)
    result["first_batch"] = lap()
    result["all_mb"] = round((anonymous_memory() - base) / 1e6, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "samples": len(cache.reader.samples),
        "usable": len(usable),
        "held_out": len(held),
        "shard_files": len(cache.reader._objects),
        "shards_of_the_first_mix": MIXED_BLOCKS,
        "samples_parquet_bytes": (root / SAMPLES).stat().st_size,
        "manifest_bytes": (root / MANIFEST).stat().st_size,
        **result,
        "process_peak_mb": round(peak * 1024 / 1e6, 1),
        "of_it_libraries_mb": round(base_peak * 1024 / 1e6, 1),
    }


if __name__ == "__main__":
    main()
