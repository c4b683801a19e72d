"""Measure input at scale: listing a folder, tar shards against files, Parquet by memory limit.

    python benchmarks/inputs.py --work SCRATCH [--files 200000] [--rows 20000] [--results DIR]

Images are random bytes of 20 to 80 kB: nothing is decoded, only found and read, in one permuted
order, from the page cache. Peak memory is that of a process of its own, above what it has after its
imports. Results: docs/results/inputs.json; if it exists, its content is shown; pass --results with
an empty folder to measure again.
"""

import argparse
import io
import multiprocessing
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dtcache.images import FolderSource, ImageSource, ParquetSource, TarSource, folder
from dtcache.rng import permuted
from dtcache.samples import SampleList
from dtcache.store.sample_index import hash_samples

FILES = 5
HELD_MIB = (2048, 512, 128)
GROUP_ROWS = (100, 1000, 4000)
MIB = 1 << 20


def main() -> None:
    """Measure, print, and keep the result."""
    from records import (
        Results,
        results_flag,
    )  # imports torch, which the measured processes do without

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=20_000)
    results_flag(parser)
    asked = parser.parse_args()
    command = (
        f"python benchmarks/inputs.py --work SCRATCH --files {asked.files} --rows {asked.rows}"
    )
    results = Results(folder=asked.results, command=command)
    result = results.once("inputs", lambda: measure(asked.work, asked.files, asked.rows))
    print(*(f"{name}: {value}" for name, value in result["list"].items()), sep="\n")
    for row in result["reads"]:
        print(
            f"{row['source']:34} open {row['open_s']:5.1f} s, {row['rows_per_s']:8.0f} rows/s, "
            f"{row['cpu_ms']:5.2f} ms CPU per row, peak {row['peak_mib']:5.0f} MiB"
        )


def measure(work: Path, files: int, rows: int) -> dict[str, Any]:
    """Return the times and memory of listing and reading."""
    kinds: list[tuple[str, Any, Any]] = [
        ("folder", write_folder, FolderSource),
        ("tars", write_tars, open_tars),
    ]
    for group in GROUP_ROWS:
        for held in HELD_MIB:
            kinds.append(
                (f"Parquet, groups of {group}, {held} MiB", Written(group), Held(held * MIB))
            )
    reads = []
    for name, write, open_with in kinds:
        root = alone(
            write, work, rows
        )  # in another process, so that the memory of writing does not count towards the peak
        reads.append(alone(read_all, name, open_with, root, rows))
    return {"list": alone(list_files, work, files), "reads": reads}


def alone(run: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, arguments)


def list_files(work: Path, count: int) -> dict[str, float]:
    """List a folder of classes of 1,000 empty files: time, pathlib's time, memory per sample."""
    root = work / f"files-{count}"
    for start in range(0, 0 if root.exists() else count, 1000):
        (root / f"class_{start // 1000:08}").mkdir(parents=True)
        for number in range(start, start + 1000):
            (
                root
                / f"class_{start // 1000:08}"
                / f"n{start // 1000:08}_{number:08}_photograph.jpeg"
            ).touch()
    started = time.perf_counter()
    paths = (p for p in root.rglob("*") if p.suffix.lower() in folder.EXTENSIONS and p.is_file())
    slow = sorted(p.relative_to(root).as_posix() for p in paths)
    between = time.perf_counter()
    source = FolderSource(root)
    seconds = time.perf_counter() - between
    assert list(source.keys) == slow
    del source
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    source = FolderSource(root)
    samples = SampleList(source.keys, source.labels, permuted(count, seed=0, stream="rows"))
    hash_samples(samples)
    kept, most = tracemalloc.get_traced_memory()
    arrow = pa.total_allocated_bytes() - arrow
    return {
        "files": count,
        "key_length": len(slow[0]),
        "pathlib_s": between - started,
        "list_s": seconds,
        "kept_bytes_a_sample": (kept + arrow) / count,
        "peak_bytes_a_sample": (most + arrow) / count,
    }


def read_all(name: str, open_with: Any, root: Path, count: int) -> dict[str, Any]:
    """Read every image once, in a permuted order."""
    before = memory("VmRSS")
    started = time.perf_counter()
    source: ImageSource = open_with(root)
    opened = time.perf_counter()
    cpu = time.process_time()
    size = 0
    for _, fetch in source.fetches(permuted(count, seed=0, stream="rows").tolist()):
        size += len(fetch())
    seconds = time.perf_counter() - opened
    cpu = time.process_time() - cpu
    peak = memory("VmHWM") - before
    return {
        "source": name,
        "open_s": opened - started,
        "rows_per_s": count / seconds,
        "cpu_ms": 1000 * cpu / count,
        "peak_mib": peak,
        "bytes": size,
    }


def memory(field: str) -> float:
    """Return a figure of this process's memory, MiB; getrusage would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def parts(count: int) -> Iterator[list[tuple[str, bytes]]]:
    """Yield the images of each file, the same whatever the kind of file."""
    rng = np.random.default_rng(0)
    for part in range(FILES):
        sizes = rng.integers(20_000, 80_000, count // FILES)
        yield [
            (f"{part}/{number:06}.jpg", rng.bytes(int(size))) for number, size in enumerate(sizes)
        ]


def write_folder(work: Path, count: int) -> Path:
    """Write the images as files."""
    root = work / f"folder-{count}"
    for images in parts(count) if not root.exists() else ():
        for name, data in images:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
    return root


def write_tars(work: Path, count: int) -> Path:
    """Write the images as tar shards."""
    root = work / f"tars-{count}"
    for part, images in enumerate(parts(count) if not root.exists() else ()):
        root.mkdir(exist_ok=True)
        with tarfile.open(root / f"{part}.tar", "w") as tar:
            for name, data in images:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return root


def open_tars(root: Path) -> TarSource:
    """Open the tar shards."""
    return TarSource(sorted(root.glob("*.tar")))


class Written:
    """Writes the images as Parquet files with row groups of so many rows."""

    def __init__(self, group_rows: int) -> None:
        self._rows = group_rows

    def __call__(self, work: Path, count: int) -> Path:
        root = work / f"parquet-{count}-{self._rows}"
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        for part, images in enumerate(parts(count) if not root.exists() else ()):
            root.mkdir(exist_ok=True)
            column = pa.array([{"bytes": data, "path": name} for name, data in images], kind)
            pq.write_table(
                pa.table({"image": column}), root / f"{part}.parquet", row_group_size=self._rows
            )
        return root


class Held:
    """Opens Parquet files of which so many bytes may be held."""

    def __init__(self, held_bytes: int) -> None:
        self._held_bytes = held_bytes

    def __call__(self, root: Path) -> ParquetSource:
        return ParquetSource(sorted(root.glob("*.parquet")), self._held_bytes)


if __name__ == "__main__":
    main()
