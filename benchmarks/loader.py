"""Compare the loading rates of dtcache, an fp16 memory map, zarr-python, TensorStore and LitData.

    pip install -e '.[bench]' && python benchmarks/loader.py [--work runs/loader] \
        [--rounds 5] [--results DIR]

All loaders run on one core and read the same samples in the same random batches. dtcache reads its
cache at a ratio of 50 and returns coefficients, which training sends to the device; a separate row
adds decoding to features on the CPU. The memory map returns fp16 features. The other loaders read
the same features as int8, uncompressed, with one chunk per sample and tap. The chunks of Zarr and
of dtcache have a CRC-32C.

- Warm rates are views per second of CPU time. The rounds are interleaved, and ratios are medians
  over the rounds.
- Cold rates are views per second of wall time. The files are dropped from the page cache, and each
  sample is read once in a block shuffle. The script also counts the bytes read from the disk.
- Rates at a bandwidth are computed: the lesser of the warm rate and of the bandwidth divided by the
  bytes from the disk per view. They hold for a disk whose bandwidth is shared.

Results: docs/results/loader.json.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tensorstore
import torch
import zarr
from litdata.streaming import Cache as LitCache
from litdata.streaming import StreamingDataset
from records import results_flag, write
from synthetic import (
    LARGE,
    SMALL,
    Shape,
    SyntheticCache,
    features,
    fit_pyramid,
    names_of,
    synthetic_payloads,
    write_synthetic_cache,
)
from zarr.codecs import Crc32cCodec

from dtcache.cache.cache import Cache
from dtcache.recipe import array_of

RATIO = 50.0
BANDWIDTHS = {"100 MB/s": 100e6, "250 MB/s": 250e6, "1 GB/s": 1e9}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pyramid:
    """The feature shapes of one teacher, and the number of samples in the files."""

    name: str
    shapes: tuple[Shape, ...]
    distinct: int
    """Different samples; the files repeat them, so that every sample has its own bytes on disk."""
    samples: int
    batch: int
    fit_views: int
    shard_rows: int
    mix: int
    """Neighbouring samples that a cold round shuffles together."""


PYRAMIDS = (
    Pyramid(
        name="small",
        shapes=SMALL,
        distinct=256,
        samples=16_384,
        batch=256,
        fit_views=64,
        shard_rows=64,
        mix=512,
    ),
    Pyramid(
        name="large",
        shapes=LARGE,
        distinct=12,
        samples=384,
        batch=8,
        fit_views=6,
        shard_rows=16,
        mix=16,
    ),
)
WARM = "warm views/s"
WARM_RATIO = "dtcache / loader, warm"
COLD = "cold views/s"
DISK_BYTES = "disk bytes per view"
DECODED = "dtcache, decoded"
SLOW = ("zarr-python", DECODED)
"""Loaders that read one batch per warm round instead of four."""
Read = Callable[[np.ndarray], object]
"""A function from row numbers to a batch on the host."""


def main() -> None:
    """Write missing files, then measure, print and record the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/loader"), help="folder of the files [runs/loader]"
    )
    parser.add_argument("--rounds", type=int, default=5, help="warm rounds [5]")
    results_flag(parser)
    args = parser.parse_args()
    started = time.time()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    result = {}
    for pyramid in PYRAMIDS:
        root = args.work / pyramid.name
        if not (root / "done").exists():
            write_samples(root, pyramid)
            (root / "done").touch()
        result[pyramid.name] = measure(root, pyramid, args.rounds)
        print_table(pyramid, result[pyramid.name])
    command = f"python benchmarks/loader.py --rounds {args.rounds}"
    write(args.results / "loader.json", command, result, time.time() - started)


def write_samples(root: Path, pyramid: Pyramid) -> None:
    """Write the same samples in the format of every loader."""
    root.mkdir(parents=True, exist_ok=True)
    fit = fit_pyramid(pyramid.shapes, pyramid.fit_views, RATIO)
    payloads = synthetic_payloads(fit, pyramid.shapes, pyramid.distinct, 1000)
    int8 = {}
    group = zarr.create_group(root / "int8.zarr", zarr_format=3, overwrite=True)
    for index, (name, shape) in enumerate(
        zip(names_of(pyramid.shapes), pyramid.shapes, strict=True)
    ):
        maps = features(shape, pyramid.distinct, seed=1000 + index)
        scale = maps.abs().amax((0, 2, 3), keepdim=True) / 127
        int8[name] = (maps / scale).round().to(torch.int8).numpy()
        half = np.lib.format.open_memmap(
            root / f"{name.split('/')[1]}.npy", "w+", np.float16, (pyramid.samples, *shape)
        )
        write_repeated(half, maps.half().numpy())
        array = group.create_array(
            name,
            shape=(pyramid.samples, *shape),
            dtype="int8",
            chunks=(1, *shape),
            shards=(pyramid.shard_rows, *shape),
            compressors=[Crc32cCodec()],
            filters=None,
        )
        write_repeated(array, int8[name], pyramid.shard_rows)
    write_synthetic_cache(
        root / "cache",
        SyntheticCache(
            shapes=pyramid.shapes,
            fit=fit,
            rows=pyramid.samples,
            shard_rows=pyramid.shard_rows,
        ),
        lambda row: payloads[row % pyramid.distinct],
    )
    (root / "litdata").mkdir()
    lit = LitCache(str(root / "litdata"), chunk_bytes="64MB")
    for row in range(pyramid.samples):
        lit[row] = {name: maps[row % pyramid.distinct] for name, maps in int8.items()}
    lit.done()
    lit.merge()


def write_repeated(array: np.ndarray | zarr.Array, maps: np.ndarray, step: int = 64) -> None:
    """Fill an array with repetitions of `maps`, `step` rows at a time."""
    for start in range(0, array.shape[0], step):
        rows = np.arange(start, min(start + step, array.shape[0]))
        array[start : start + len(rows)] = maps[rows % len(maps)]


def loaders(root: Path, pyramid: Pyramid) -> dict[str, Read]:
    """Open the files of every loader; return its read function by name."""
    names = names_of(pyramid.shapes)
    cache = Cache(root / "cache")
    decoder = cache.decoder(names)
    halves = {name: np.load(root / f"{name.split('/')[1]}.npy", mmap_mode="r") for name in names}
    arrays = {name: zarr.open_array(root / "int8.zarr", path=name, mode="r") for name in names}
    context = tensorstore.Context(
        {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    )
    files = {name: {"driver": "file", "path": f"{root}/int8.zarr/{name}"} for name in names}
    specs = {name: {"driver": "zarr3", "kvstore": file} for name, file in files.items()}
    stores = {
        name: tensorstore.open(spec, open=True, read=True, context=context).result()
        for name, spec in specs.items()
    }
    lit_samples = chain.from_iterable(repeat(StreamingDataset(str(root / "litdata"), shuffle=True)))

    def coefficients(rows: np.ndarray) -> dict[str, torch.Tensor]:
        return cache.coefficients(rows, np.zeros_like(rows), names)[0]

    def lit_batch(rows: np.ndarray) -> dict[str, np.ndarray]:
        items = list(islice(lit_samples, len(rows)))
        return {name: np.stack([item[name] for item in items]) for name in names}

    return {
        "dtcache": coefficients,
        DECODED: lambda rows: decoder(coefficients(rows)),
        "fp16 memory map": lambda rows: {name: half[rows] for name, half in halves.items()},
        "zarr-python": lambda rows: {name: array.oindex[rows] for name, array in arrays.items()},
        "TensorStore": lambda rows: {name: stores[name][rows].read().result() for name in names},
        "LitData": lit_batch,
    }


def measure(root: Path, pyramid: Pyramid, rounds: int) -> dict[str, dict[str, float]]:
    """Return each loader's rates (warm, cold, at the bandwidths) and its disk bytes per view."""
    # The system does not drop pages of a file that a process maps. So cold reads come first, each
    # in a separate process.
    names = ("dtcache", "fp16 memory map", "zarr-python", "TensorStore", "LitData")
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        cold = {name: pool.apply(read_cold, (root, name, pyramid)) for name in names}
    warm = read_warm(loaders(root, pyramid), pyramid, rounds)
    result = {}
    for name, rates in warm.items():
        rate = statistics.median(rates)
        result[name] = {
            WARM: round(rate, 1),
            WARM_RATIO: round(
                statistics.median(a / b for a, b in zip(warm["dtcache"], rates, strict=True)), 3
            ),
        }
        if name in cold:
            cold_rate, bytes_per_view = cold[name]
            result[name] |= {
                COLD: round(cold_rate, 1),
                DISK_BYTES: round(bytes_per_view),
                **{
                    f"views/s at {label}": round(min(rate, bandwidth / bytes_per_view), 1)
                    for label, bandwidth in BANDWIDTHS.items()
                },
            }
    return result


def read_warm(opened: dict[str, Read], pyramid: Pyramid, rounds: int) -> dict[str, list[float]]:
    """Return views per second of CPU time, by loader, one value per round.

    In each round all loaders read the same random batches. The first round warms up and is dropped.
    """
    rng = np.random.default_rng(0)
    warm: dict[str, list[float]] = {name: [] for name in opened}
    for round_ in range(rounds + 1):
        batches = [rng.integers(0, pyramid.samples, pyramid.batch) for _ in range(4)]
        for name, read in opened.items():
            timed_batches = batches[:1] if name in SLOW else batches
            started = time.process_time()
            for rows in timed_batches:
                read(rows)
            if round_:
                num_views = sum(map(len, timed_batches))
                warm[name].append(num_views / (time.process_time() - started))
    return warm


def read_cold(root: Path, name: str, pyramid: Pyramid) -> tuple[float, float]:
    """Drop all files from the page cache and read every sample once, in mixed order.

    Return views per second of wall time, and bytes from the disk per view. dtcache and the memory
    map prefetch the next mix while they read one, as dtcache's block shuffle does.
    """
    torch.set_num_threads(1)
    # The first batch of a process loads compiled code: that is no part of the rate.
    loaders(root, pyramid)[name](np.arange(pyramid.batch))
    for path in (p for p in root.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read = loaders(root, pyramid)[name]
    prefetch = prefetcher(root, name, pyramid)
    disk_bytes_before = disk_bytes()
    started = time.perf_counter()
    mixes = list(mixed_rows(pyramid))
    for index, rows in enumerate(mixes):
        for next_rows in mixes[index + (index > 0) : index + 2]:
            prefetch(next_rows)
        for start in range(0, len(rows), pyramid.batch):
            read(rows[start : start + pyramid.batch])
    seconds = time.perf_counter() - started
    fetched = disk_bytes() - disk_bytes_before
    return pyramid.samples / seconds, fetched / pyramid.samples


def mixed_rows(pyramid: Pyramid) -> Iterator[np.ndarray]:
    """Yield the rows of each mix: mixes of neighbours in random order, shuffled within the mix."""
    rng = np.random.default_rng(1)
    for start in rng.permutation(np.arange(0, pyramid.samples, pyramid.mix)):
        yield rng.permutation(np.arange(start, min(start + pyramid.mix, pyramid.samples)))


def prefetcher(root: Path, name: str, pyramid: Pyramid) -> Callable[[np.ndarray], None]:
    """Return a loader's function that prefetches rows; it does nothing for other loaders."""
    if name == "dtcache":
        return partial(prefetch_cache, Cache(root / "cache"))
    if name != "fp16 memory map":
        return lambda rows: None
    files = [os.open(root / f"stride{2**i}.npy", os.O_RDONLY) for i in range(len(pyramid.shapes))]
    sizes = [2 * int(np.prod(shape)) for shape in pyramid.shapes]

    def prefetch_map(rows: np.ndarray) -> None:
        for file, size in zip(files, sizes, strict=True):
            os.posix_fadvise(file, int(rows.min()) * size, len(rows) * size, os.POSIX_FADV_WILLNEED)

    return prefetch_map


def prefetch_cache(cache: Cache, rows: np.ndarray) -> None:
    """Prefetch all views of some rows of a cache."""
    cache.reader.will_need(array_of(cache.names[0]), np.sort(rows))


def disk_bytes() -> int:
    """Return the bytes that the system has read from the disk for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def print_table(pyramid: Pyramid, result: dict[str, dict[str, float]]) -> None:
    """Print one row per loader; nan if a loader has no cold rate."""
    columns = list(next(iter(result.values())))
    print(f"\n{pyramid.name}: {sum(map(np.prod, pyramid.shapes))} values per view")
    print(f"{'':18}" + "".join(f"{column:>24}" for column in columns))
    for name, row in result.items():
        cells = [f"{row.get(column, float('nan')):>24.5g}" for column in columns]
        print(f"{name:18}" + "".join(cells))


if __name__ == "__main__":
    main()
