"""Measure input at scale: listing a folder, and reading from files, tar shards and Parquet.

    python benchmarks/inputs.py --work SCRATCH [--files 200000] [--rows 20000] [--results DIR]

Images are random bytes of 20 to 80 kB. The script reads them once, in one permuted order, from the
page cache; it decodes nothing. Parquet is read under several memory limits. Peak memory is that of
a separate process, minus its memory after the imports.

Results: docs/results/inputs.json.
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

CONTAINERS = 5
"""Tar shards, Parquet files or folders that the images are divided among."""
HELD_MIB = (2048, 512, 128)
"""Memory limits of the Parquet source."""
GROUP_ROWS = (100, 1000, 4000)
"""Rows per row group of the Parquet files."""
MIB = 1 << 20


def main() -> None:
    """Measure or read the result, and print it."""
    # `records` imports torch, which the measured processes must not load.
    from records import results_flag, write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the written images")
    parser.add_argument(
        "--files", type=int, default=200_000, help="empty files of the listed folder [200000]"
    )
    parser.add_argument("--rows", type=int, default=20_000, help="images to read [20000]")
    results_flag(parser)
    args = parser.parse_args()
    command = f"python benchmarks/inputs.py --work SCRATCH --files {args.files} --rows {args.rows}"
    started = time.time()
    result = measure(args.work, args.files, args.rows)
    write(args.results / "inputs.json", command, result, time.time() - started)
    print(*(f"{name}: {value}" for name, value in result["list"].items()), sep="\n")
    for row in result["reads"]:
        print(
            f"{row['source']:34} open {row['open_s']:5.1f} s, {row['rows_per_s']:8.0f} rows/s, "
            f"{row['cpu_ms']:5.2f} ms CPU per row, peak {row['peak_mib']:5.0f} MiB"
        )


def measure(work: Path, files: int, rows: int) -> dict[str, Any]:
    """Return the times and the memory of listing and reading."""
    kinds: list[tuple[str, Any, Any]] = [
        ("folder", write_folder, FolderSource),
        ("tars", write_tars, open_tars),
    ]
    for group in GROUP_ROWS:
        for held in HELD_MIB:
            kinds.append(
                (
                    f"Parquet, groups of {group}, {held} MiB",
                    ParquetWriter(group),
                    ParquetOpener(held * MIB),
                )
            )
    reads = []
    for name, write, open_with in kinds:
        # A separate process writes, so that its memory does not count towards the peak of reading.
        root = run_in_process(write, work, rows)
        reads.append(run_in_process(read_all, name, open_with, root, rows))
    return {"list": run_in_process(list_files, work, files), "reads": reads}


def run_in_process(run: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a separate process and return its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, arguments)


def list_files(work: Path, count: int) -> dict[str, float]:
    """List class folders of 1,000 empty files each; return the times and the memory per sample.

    Raises RuntimeError if FolderSource and pathlib list different files.
    """
    root = work / f"files-{count}"
    for start in range(0, 0 if root.exists() else count, 1000):
        class_folder = root / f"class_{start // 1000:08}"
        class_folder.mkdir(parents=True)
        for number in range(start, start + 1000):
            (class_folder / f"n{start // 1000:08}_{number:08}_photograph.jpeg").touch()
    started = time.perf_counter()
    paths = (p for p in root.rglob("*") if p.suffix.lower() in folder.EXTENSIONS and p.is_file())
    pathlib_keys = sorted(p.relative_to(root).as_posix() for p in paths)
    pathlib_ended = time.perf_counter()
    source = FolderSource(root)
    list_seconds = time.perf_counter() - pathlib_ended
    if list(source.keys) != pathlib_keys:
        raise RuntimeError(f"{root}: FolderSource does not list the same files as pathlib")
    del source
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    source = FolderSource(root)
    samples = SampleList(source.keys, source.labels, permuted(count, seed=0, stream="rows"))
    hash_samples(samples)
    kept, peak = tracemalloc.get_traced_memory()
    arrow = pa.total_allocated_bytes() - arrow
    return {
        "files": count,
        "key_length": len(pathlib_keys[0]),
        "pathlib_s": pathlib_ended - started,
        "list_s": list_seconds,
        "kept_bytes_per_sample": (kept + arrow) / count,
        "peak_bytes_per_sample": (peak + arrow) / count,
    }


def read_all(name: str, open_with: Any, root: Path, count: int) -> dict[str, Any]:
    """Read every image once, in a permuted order; return the rate and the memory."""
    memory_before = memory_mib("VmRSS")
    started = time.perf_counter()
    source: ImageSource = open_with(root)
    opened = time.perf_counter()
    cpu = time.process_time()
    size = 0
    for _, fetch in source.fetches(permuted(count, seed=0, stream="rows").tolist()):
        size += len(fetch())
    seconds = time.perf_counter() - opened
    cpu = time.process_time() - cpu
    peak = memory_mib("VmHWM") - memory_before
    return {
        "source": name,
        "open_s": opened - started,
        "rows_per_s": count / seconds,
        "cpu_ms": 1000 * cpu / count,
        "peak_mib": peak,
        "bytes": size,
    }


def memory_mib(field: str) -> float:
    """Return a field of /proc/self/status in MiB.

    The peak of getrusage is not used, because it includes the memory of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def containers(count: int) -> Iterator[list[tuple[str, bytes]]]:
    """Yield the names and bytes of the images of each container, the same for every format."""
    rng = np.random.default_rng(0)
    for index in range(CONTAINERS):
        sizes = rng.integers(20_000, 80_000, count // CONTAINERS)
        yield [
            (f"{index}/{number:06}.jpg", rng.bytes(int(size))) for number, size in enumerate(sizes)
        ]


def write_folder(work: Path, count: int) -> Path:
    """Write the images as files, unless the folder exists, and return the folder."""
    root = work / f"folder-{count}"
    for images in containers(count) if not root.exists() else ():
        for name, data in images:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
    return root


def write_tars(work: Path, count: int) -> Path:
    """Write the images as tar shards, unless the folder exists, and return the folder."""
    root = work / f"tars-{count}"
    for index, images in enumerate(containers(count) if not root.exists() else ()):
        root.mkdir(exist_ok=True)
        with tarfile.open(root / f"{index}.tar", "w") as tar:
            for name, data in images:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return root


def open_tars(root: Path) -> TarSource:
    """Open the tar shards of a folder."""
    return TarSource(sorted(root.glob("*.tar")))


class ParquetWriter:
    """Writes the images as Parquet files with `group_rows` rows per row group."""

    def __init__(self, group_rows: int) -> None:
        self._rows = group_rows

    def __call__(self, work: Path, count: int) -> Path:
        root = work / f"parquet-{count}-{self._rows}"
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        for index, images in enumerate(containers(count) if not root.exists() else ()):
            root.mkdir(exist_ok=True)
            column = pa.array([{"bytes": data, "path": name} for name, data in images], kind)
            pq.write_table(
                pa.table({"image": column}), root / f"{index}.parquet", row_group_size=self._rows
            )
        return root


class ParquetOpener:
    """Opens Parquet files with a limit of `held_bytes` on the images in memory."""

    def __init__(self, held_bytes: int) -> None:
        self._held_bytes = held_bytes

    def __call__(self, root: Path) -> ParquetSource:
        return ParquetSource(sorted(root.glob("*.parquet")), self._held_bytes)


if __name__ == "__main__":
    main()
