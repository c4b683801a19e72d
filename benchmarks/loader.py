"""Views per second on one core: dtcache, fp16 memory map, zarr-python, TensorStore and LitData.

    pip install -e '.[bench]' && python benchmarks/loader.py [--work runs/loader] \
        [--rounds 5] [--results DIR]

All serve the same samples in the same random batches: dtcache its 50-fold cache as the batch of
coefficients that stage 2 sends to the device (and, apart, as decoded features on the CPU), the
memory map fp16, the others the same features as int8 in one chunk per sample and tap, uncompressed.
Zarr's chunks carry a CRC-32C, as dtcache's do. Warm rounds interleave the loaders and count CPU
time, since every loader is kept to one core and nothing waits for a disk; the ratios are medians
over rounds. Cold rounds drop the files from the page cache, read each sample once in a block
shuffle, and count wall time and the bytes that came from the disk. Where a disk is shared, the rate
is the lesser of what the core and what the bandwidth allow; the table gives it for a few
bandwidths.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from synthetic import LARGE, SMALL, Shape, features, fit_pyramid, names_of, write_synthetic_cache
from zarr.codecs import Crc32cCodec

from dtcache.cache.cache import Cache
from dtcache.codec import FeatureEncoder

RATIO = 50.0
BANDWIDTHS = {"100 MB/s": 100e6, "250 MB/s": 250e6, "1 GB/s": 1e9}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pyramid:
    """One kind of teacher and how many samples of it are made."""

    name: str
    shapes: tuple[Shape, ...]
    distinct: int
    """Maps that are made; samples repeat them, their bytes are on the disk once per sample."""
    samples: int
    batch: int
    fit_views: int
    shard_rows: int
    mix: int
    """Number of neighbouring samples that a cold round shuffles together."""


PYRAMIDS = (
    Pyramid(
        name="small",
        shapes=SMALL,
        distinct=256,
        samples=4096,
        batch=256,
        fit_views=64,
        shard_rows=64,
        mix=512,
    ),
    Pyramid(
        name="large",
        shapes=LARGE,
        distinct=12,
        samples=96,
        batch=8,
        fit_views=6,
        shard_rows=16,
        mix=16,
    ),
)
OURS = "dtcache is warm times"
FEATURES = "dtcache, decoded"
SLOW = ("zarr-python", FEATURES)
Read = Callable[[np.ndarray], object]


def main() -> None:
    """Make what is missing, measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/loader"))
    parser.add_argument("--rounds", type=int, default=5)
    results_flag(parser)
    asked = parser.parse_args()
    begun = time.time()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    result = {}
    for pyramid in PYRAMIDS:
        root = asked.work / pyramid.name
        if not (root / "done").exists():
            make(root, pyramid)
            (root / "done").touch()
        result[pyramid.name] = measure(root, pyramid, asked.rounds)
        show(pyramid, result[pyramid.name])
    command = f"python benchmarks/loader.py --rounds {asked.rounds}"
    write(asked.results / "loader.json", command, result, time.time() - begun)


def make(root: Path, pyramid: Pyramid) -> None:
    """Write the same samples for every loader."""
    root.mkdir(parents=True, exist_ok=True)
    fit = fit_pyramid(pyramid.shapes, pyramid.fit_views, RATIO)
    encoder = FeatureEncoder(fit, torch.device("cpu"))
    payloads = {}
    int8 = {}
    group = zarr.create_group(root / "int8.zarr", zarr_format=3, overwrite=True)
    for place, (name, shape) in enumerate(
        zip(names_of(pyramid.shapes), pyramid.shapes, strict=True)
    ):
        maps = features(shape, pyramid.distinct, seed=1000 + place)
        payloads[name] = [view.payload for view in encoder.encode(name, maps)]
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
        pyramid.shapes,
        fit,
        lambda name, row: payloads[name][row % pyramid.distinct],
        pyramid.samples,
        pyramid.shard_rows,
    )
    (root / "litdata").mkdir()
    lit = LitCache(str(root / "litdata"), chunk_bytes="64MB")
    for row in range(pyramid.samples):
        lit[row] = {name: maps[row % pyramid.distinct] for name, maps in int8.items()}
    lit.done()
    lit.merge()


def write_repeated(array: np.ndarray | zarr.Array, maps: np.ndarray, step: int = 64) -> None:
    """Fill an array with maps, over and over."""
    for start in range(0, array.shape[0], step):
        rows = np.arange(start, min(start + step, array.shape[0]))
        array[start : start + len(rows)] = maps[rows % len(maps)]


def loaders(root: Path, pyramid: Pyramid) -> dict[str, Read]:
    """Open every loader: a function from sample numbers to a batch on the host."""
    names = names_of(pyramid.shapes)
    cache = Cache(root / "cache")
    decoder = cache.decoder(names)
    halves = {name: np.load(root / f"{name.split('/')[1]}.npy", mmap_mode="r") for name in names}
    arrays = {name: zarr.open_array(root / "int8.zarr", path=name, mode="r") for name in names}
    context = tensorstore.Context(
        {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    )
    specs = {name: {"driver": "file", "path": f"{root}/int8.zarr/{name}"} for name in names}
    specs = {name: {"driver": "zarr3", "kvstore": place} for name, place in specs.items()}
    stores = {
        n: tensorstore.open(spec, open=True, read=True, context=context).result()
        for n, spec in specs.items()
    }
    served = chain.from_iterable(repeat(StreamingDataset(str(root / "litdata"), shuffle=True)))

    def coefficients(rows: np.ndarray) -> dict[str, torch.Tensor]:
        return cache.coefficients(rows, np.zeros_like(rows), names)[0]

    def lit_batch(rows: np.ndarray) -> dict[str, np.ndarray]:
        items = list(islice(served, len(rows)))
        return {name: np.stack([item[name] for item in items]) for name in names}

    return {
        "dtcache": coefficients,
        FEATURES: lambda rows: decoder(coefficients(rows)),
        "fp16 memory map": lambda rows: {name: half[rows] for name, half in halves.items()},
        "zarr-python": lambda rows: {name: array.oindex[rows] for name, array in arrays.items()},
        "TensorStore": lambda rows: {name: stores[name][rows].read().result() for name in names},
        "LitData": lit_batch,
    }


def measure(root: Path, pyramid: Pyramid, rounds: int) -> dict[str, dict[str, float]]:
    """Return, by loader, warm and cold views/s, bytes from the disk per view, and rates at given
    bandwidths.
    """
    # Pages of a file that some process maps cannot be dropped: cold reads come first, each in a
    # process of its own.
    names = ("dtcache", "fp16 memory map", "zarr-python", "TensorStore", "LitData")
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        cold = {name: pool.apply(read_cold, (root, name, pyramid)) for name in names}
    warm = read_warm(loaders(root, pyramid), pyramid, rounds)
    result = {}
    for name, rates in warm.items():
        rate = statistics.median(rates)
        result[name] = {
            "warm views/s": round(rate, 1),
            OURS: round(
                statistics.median(a / b for a, b in zip(warm["dtcache"], rates, strict=True)), 3
            ),
        }
        if name in cold:
            served, fetched = cold[name]
            limited = {
                f"at {label}": round(min(rate, width / fetched), 1)
                for label, width in BANDWIDTHS.items()
            }
            result[name] |= {
                "cold views/s": round(served, 1),
                "disk bytes a view": round(fetched),
                **limited,
            }
    return result


def read_warm(opened: dict[str, Read], pyramid: Pyramid, rounds: int) -> dict[str, list[float]]:
    """Return views/s of CPU time by loader and round; in each round all loaders read the same
    random batches.
    """
    rng = np.random.default_rng(0)
    warm: dict[str, list[float]] = {name: [] for name in opened}
    for round_ in range(rounds + 1):
        batches = [rng.integers(0, pyramid.samples, pyramid.batch) for _ in range(4)]
        for name, read in opened.items():
            part = batches[:1] if name in SLOW else batches
            started = time.process_time()
            for rows in part:
                read(rows)
            if round_:  # the first one warms up
                warm[name].append(sum(map(len, part)) / (time.process_time() - started))
    return warm


def read_cold(root: Path, name: str, pyramid: Pyramid) -> tuple[float, float]:
    """Drop all files from the page cache, read every sample once; return views/s and bytes from the
    disk a view.

    dtcache and the memory map tell the disk of the next mix while they read one, as dtcache's block
    shuffle does.
    """
    for path in (p for p in root.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    torch.set_num_threads(1)
    read = loaders(root, pyramid)[name]
    tell = advice(root, name, pyramid)
    before = disk_bytes()
    started = time.perf_counter()
    mixes = list(mixed(pyramid))
    for place, rows in enumerate(mixes):
        for soon in mixes[place + (place > 0) : place + 2]:
            tell(soon)
        for start in range(0, len(rows), pyramid.batch):
            read(rows[start : start + pyramid.batch])
    return pyramid.samples / (time.perf_counter() - started), (
        disk_bytes() - before
    ) / pyramid.samples


def mixed(pyramid: Pyramid) -> Iterator[np.ndarray]:
    """Yield every sample once: stretches of neighbours, in random order, shuffled within."""
    rng = np.random.default_rng(1)
    for start in rng.permutation(np.arange(0, pyramid.samples, pyramid.mix)):
        yield rng.permutation(np.arange(start, min(start + pyramid.mix, pyramid.samples)))


def advice(root: Path, name: str, pyramid: Pyramid) -> Callable[[np.ndarray], None]:
    """Return how a loader tells the disk of samples that it will read soon."""
    if name == "dtcache":
        cache = Cache(root / "cache")
        return lambda rows: (
            [cache.reader.will_need(array, np.sort(rows)) for array in cache.names] and None
        )
    if name != "fp16 memory map":
        return lambda rows: None
    files = [os.open(root / f"stride{2**i}.npy", os.O_RDONLY) for i in range(len(pyramid.shapes))]
    sizes = [2 * int(np.prod(shape)) for shape in pyramid.shapes]

    def tell(rows: np.ndarray) -> None:
        for file, size in zip(files, sizes, strict=True):
            os.posix_fadvise(file, int(rows.min()) * size, len(rows) * size, os.POSIX_FADV_WILLNEED)

    return tell


def disk_bytes() -> int:
    """Return the bytes that this process has had fetched from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def show(pyramid: Pyramid, result: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    columns = list(next(iter(result.values())))
    print(f"\n{pyramid.name}: {sum(map(np.prod, pyramid.shapes))} values per view")
    print(f"{'':24}" + "".join(f"{column:>22}" for column in columns))
    for name, row in result.items():
        print(
            f"{name:24}" + "".join(f"{row.get(column, float('nan')):>22.5g}" for column in columns)
        )


if __name__ == "__main__":
    main()
