"""Images in Parquet files, of any number and size: held in memory where they are few, else read a
window at a time.

Rows are wanted in a permuted order, and a file gives them by row groups. A window is as many of the
coming rows as fit in memory: each row group that has some of them is read once for all of these,
while the window before is used up. So an image costs at most the reading of its row group, and all
of them at most a pass over the files a window.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dtcache.errors import ImagesNotFoundError
from dtcache.images.duplicate_keys import require_unique
from dtcache.images.parquet_index import BYTES, RowGroup, failed_row, read_columns, unreadable
from dtcache.samples import Column

LEAST_HELD_BYTES = 2 << 30
HELD_SHARE = 16
"""Encoded images of 2 GiB are held, or of a sixteenth of the memory where that is more."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""What a container may use, where Linux runs it."""
BATCH_BYTES = 16 << 20
BATCH_ROWS = 256
"""Images that are decoded at once on the way through a row group; a page of the file may be more.
"""


class ParquetSource:
    """Parquet files with a column `image: struct<bytes, path>` and, optionally, `label: int`, as
    one list of rows.
    """

    def __init__(self, files: Sequence[Path], held_bytes: int | None = None) -> None:
        """Read all but the images, and these too where all of them fit into `held_bytes`.

        Raises ImagesError where the layout is another one, or where two rows have the same path.
        """
        self._held_bytes = held_bytes if held_bytes is not None else default_held_bytes()
        self._groups: list[RowGroup] = []
        paths: list[pa.Array] = []
        labels: list[pa.Array] = []
        for file in files:
            groups, table = read_columns(file)
            self._groups += groups
            paths += [chunk.field("path").cast(pa.string()) for chunk in table["image"].chunks]
            if "label" in table.column_names:
                labels += table["label"].chunks
        self._starts = np.cumsum([0, *(group.rows for group in self._groups)])
        count = int(self._starts[-1])
        if not count:
            raise ImagesNotFoundError(
                f"no images in {', '.join(map(str, files))}: the files have no rows"
            )
        self.classes: list[str] | None = None
        labelled = sum(map(len, labels)) == count
        self.labels: Column[int | None] | None = (
            Column(pa.chunked_array(labels)) if labelled else None
        )
        self.keys: Column[str] = Column(self._names(pa.chunked_array(paths)))
        self._held = self._hold()

    def _names(self, paths: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return the paths, or file:row for all where a row has none. Raises ImagesError where one
        comes twice.
        """
        if paths.null_count or pc.any(pc.equal(paths, "")).as_py():
            names = (
                [f"{group.file.stem}:{row}" for row in range(group.first, group.first + group.rows)]
                for group in self._groups
            )
            return pa.chunked_array([pa.array(part, pa.string()) for part in names])

        def place(index: int) -> str:
            group = self._groups[self._group_of(index)]
            return (
                f"row {index - self._starts[self._group_of(index)] + group.first} of {group.file}"
            )

        require_unique(
            paths,
            place,
            "give each a path of its own, or none to any: they are then named FILE:ROW",
        )
        return paths

    def _hold(self) -> pa.ChunkedArray | None:
        """Return all images where they fit, None where they do not."""
        if sum(group.size for group in self._groups) > self._held_bytes:
            return None
        held = []
        room = self._held_bytes
        for number, group in enumerate(self._groups):
            try:
                for _, values in self._stream(number, np.arange(group.rows)):
                    held.append(values)
                    room -= values.nbytes
                    if room < 0:  # a page's dictionary can hold one image for many rows
                        return None
            except (OSError, pa.ArrowException) as error:
                raise unreadable(group.file, error) from error
        return pa.chunked_array(held)

    def read(self, index: int) -> bytes:
        """Return the bytes of one row, none for an empty value. Raises OSError.

        Where the images are not held it reads on through a row group: `fetches` is for many.
        """
        if self._held is not None:
            return self._held[index].as_py() or b""
        number = self._group_of(index)
        try:
            _, values = next(self._stream(number, np.array([index]) - self._starts[number]))
        except (OSError, pa.ArrowException) as error:
            raise failed_row(self._groups[number].file, error) from error
        return values[0].as_py() or b""

    def fetches(self, indices: Iterable[int]) -> Iterator[tuple[int, Callable[[], bytes]]]:
        """Yield each index with a function that returns its image, from windows that are read in
        the order asked for.

        Two windows are held, each of half of `held_bytes`: one that is used up, and the next.
        """
        if self._held is not None:
            yield from ((index, partial(self.read, index)) for index in indices)
            return
        todo = iter(indices)
        given_up = Event()
        with ThreadPoolExecutor(1, thread_name_prefix="parquet") as pool:
            try:
                coming = self._next_rows(todo)
                waiting = pool.submit(self._window, coming, given_up)
                while len(coming):
                    rows = coming
                    window = waiting.result()
                    coming = self._next_rows(todo)
                    waiting = pool.submit(self._window, coming, given_up)
                    for place, index in enumerate(rows.tolist()):
                        yield index, partial(self._fetched, index, window[place])
            finally:
                given_up.set()

    def _fetched(self, index: int, value: bytes | OSError | None) -> bytes:
        if isinstance(value, OSError):
            raise value
        return self.read(index) if value is None else value

    def _next_rows(self, todo: Iterator[int]) -> NDArray[np.int64]:
        """Take as many indices as a window holds, by the mean size of the images of their row
        groups.
        """
        room = self._held_bytes / 2
        rows = []
        for index in todo:
            group = self._groups[self._group_of(index)]
            rows.append(index)
            room -= group.size / group.rows
            if room <= 0:
                break
        return np.array(rows, np.int64)

    def _window(self, rows: NDArray[np.int64], given_up: Event) -> list[bytes | OSError | None]:
        """Return rows' images in the order given; None for those that do not fit, as sizes differ
        within a group.

        A window may be a pass over all files: it ends early where nobody waits for it any more.
        """
        order = np.argsort(rows, kind="stable")
        groups = np.searchsorted(self._starts, rows[order], "right") - 1
        found: list[bytes | OSError | None] = [None] * len(rows)
        room = self._held_bytes // 2
        for number in np.unique(groups).tolist():
            places = order[groups == number]
            if given_up.is_set():
                break
            try:
                for at, values in self._stream(number, rows[places] - self._starts[number]):
                    room -= values.nbytes
                    for place, value in zip(
                        places[at : at + len(values)].tolist(), values, strict=True
                    ):
                        found[place] = (value.as_py() or b"") if room >= 0 else None
            except (OSError, pa.ArrowException) as error:
                for place in places.tolist():
                    found[place] = failed_row(self._groups[number].file, error)
        return found

    def _stream(self, number: int, wanted: NDArray[np.int64]) -> Iterator[tuple[int, pa.Array]]:
        """Yield (place in `wanted`, images from there on) of sorted rows of a row group, a batch at
        a time.
        """
        group = self._groups[number]
        start = 0
        batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * group.rows // max(1, group.size)))
        # Without pre-buffering a row group passes through page by page, however large it is.
        with pq.ParquetFile(group.file, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(
                batch_rows, row_groups=[group.number], columns=[BYTES], use_threads=False
            ):
                first, last = np.searchsorted(wanted, [start, start + len(batch)]).tolist()
                if first < last:
                    yield (
                        first,
                        batch.column(0).field("bytes").take(pa.array(wanted[first:last] - start)),
                    )
                start += len(batch)
                if last == len(wanted):
                    return

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, "right")) - 1


def default_held_bytes() -> int:
    """Return how many bytes of encoded images a source holds: 2 GiB, or a sixteenth of the memory
    if that is more.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    granted = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else ""
    return max(
        LEAST_HELD_BYTES, min(memory, int(granted) if granted.isdigit() else memory) // HELD_SHARE
    )
