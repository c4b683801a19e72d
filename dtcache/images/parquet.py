"""Images in Parquet files: held in memory if they are few, else read window by window.

Rows are read in a permuted order, but a file can only be read by row groups. A window is as many of
the coming rows as fit into memory. Each row group that holds some of them is read once per window,
while the previous window is consumed. So the cost of an image is at most one read of its row group,
and the cost of all images at most one pass over the files per window.
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
from dtcache.images.left_out import LeftOut
from dtcache.images.parquet_index import (
    RowGroup,
    failed_row,
    join_labels,
    read_index,
    unreadable,
)
from dtcache.images.survey import survey
from dtcache.options.images import ImagesOptions
from dtcache.samples import Column

LEAST_HELD_BYTES = 2 << 30
HELD_SHARE = 16
"""Encoded images up to 2 GiB, or up to a sixteenth of the memory if that is more, are held."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The memory limit of a container, on Linux."""
BATCH_BYTES = 16 << 20
BATCH_ROWS = 256
"""Maximum images decoded at once while a row group is read; one page of the file may hold more."""


class ParquetSource:
    """Parquet files as one list of rows.

    They have a column of images, `struct<bytes, path>` or binary, and, optionally, a column of
    labels: integers or text.
    """

    def __init__(
        self,
        files: Sequence[Path],
        held_bytes: int | None = None,
        reading: ImagesOptions | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        """Read names and labels, and also the images if all of them fit into `held_bytes`.

        `left_out` counts what was left out beside the files. Raises ImagesError if a file has
        another layout, if no row has bytes, if labels are ambiguous, or if two rows have the same
        path.
        """
        self._held_bytes = held_bytes if held_bytes is not None else default_held_bytes()
        reading = reading or ImagesOptions()
        indices = [read_index(file, reading) for file in files]
        self._groups: list[RowGroup] = [group for index in indices for group in index.groups]
        self._starts = np.cumsum([0, *(group.rows for group in self._groups)])
        count = int(self._starts[-1])
        if not count:
            raise ImagesNotFoundError(
                f"no images in {', '.join(map(str, files))}: the files have no rows"
            )
        labels, self.classes, notes = join_labels(indices)
        self.labels: Column[int | None] | None = Column(labels) if labels is not None else None
        paths = pa.chunked_array([path for index in indices for path in index.paths], pa.string())
        self.keys: Column[str] = Column(
            self._rows() if reading.keys == "rows" else self._names(paths)
        )
        num_empty = sum(index.num_empty for index in indices)
        if num_empty:
            notes.append(f"{num_empty} of {count} rows have no bytes and will fail")
        self.survey = survey(self.keys, self.labels, self.classes, left_out or LeftOut(), notes)
        self._held = self._hold()

    def _names(self, paths: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return the paths, or FILE:ROW for every row if some row has no path.

        Raises ImagesError if a path occurs twice.
        """
        if paths.null_count or pc.any(pc.equal(paths, "")).as_py():
            return self._rows()

        def describe(index: int) -> str:
            group = self._groups[self._group_of(index)]
            return (
                f"row {index - self._starts[self._group_of(index)] + group.first} of {group.file}"
            )

        require_unique(
            paths,
            describe,
            "pass `keys='rows'` to name rows FILE:ROW, or give each row its own path",
        )
        return paths

    def _rows(self) -> pa.ChunkedArray:
        """Return FILE:ROW for every row."""
        names = (
            [f"{group.file.stem}:{row}" for row in range(group.first, group.first + group.rows)]
            for group in self._groups
        )
        return pa.chunked_array([pa.array(group_names, pa.string()) for group_names in names])

    def _hold(self) -> pa.ChunkedArray | None:
        """Return all images if they fit into memory, else None."""
        if sum(group.size for group in self._groups) > self._held_bytes:
            return None
        held = []
        room = self._held_bytes
        for number, group in enumerate(self._groups):
            try:
                for _, values in self._stream(number, np.arange(group.rows)):
                    held.append(values)
                    room -= values.nbytes
                    if room < 0:  # a page's dictionary can share one image among many rows
                        return None
            except (OSError, pa.ArrowException) as error:
                raise unreadable(group.file, error) from error
        return pa.chunked_array(held)

    def read(self, index: int) -> bytes:
        """Return the bytes of one row; an empty value gives no bytes. Raises OSError.

        If the images are not held, each call reads into a row group: use `fetches` for many images.
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
        """Yield each index with a function that returns its image, window by window.

        Two windows of half of `held_bytes` each are in memory: the one being consumed, and the
        next.
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
                    for value, index in zip(window, rows.tolist(), strict=True):
                        yield index, partial(self._fetched, index, value)
            finally:
                given_up.set()

    def _fetched(self, index: int, value: bytes | OSError | None) -> bytes:
        if isinstance(value, OSError):
            raise value
        return self.read(index) if value is None else value

    def _next_rows(self, todo: Iterator[int]) -> NDArray[np.int64]:
        """Take as many indices as fill a window, by the mean image size of their row groups."""
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
        """Return the images of `rows` in their order; None stands for an image without room.

        An image may not fit into the window, because sizes are estimated per row group. A window
        may take a pass over all files; it ends early once `given_up` is set.
        """
        order = np.argsort(rows, kind="stable")
        groups = np.searchsorted(self._starts, rows[order], "right") - 1
        images: list[bytes | OSError | None] = [None] * len(rows)
        room = self._held_bytes // 2
        for number in np.unique(groups).tolist():
            positions = order[groups == number]
            if given_up.is_set():
                break
            try:
                for at, values in self._stream(number, rows[positions] - self._starts[number]):
                    room -= values.nbytes
                    for position, value in zip(
                        positions[at : at + len(values)].tolist(), values, strict=True
                    ):
                        images[position] = (value.as_py() or b"") if room >= 0 else None
            except (OSError, pa.ArrowException) as error:
                for position in positions.tolist():
                    images[position] = failed_row(self._groups[number].file, error)
        return images

    def _stream(self, number: int, rows: NDArray[np.int64]) -> Iterator[tuple[int, pa.Array]]:
        """Yield (position in `rows`, images from there on), in batches.

        `rows` are sorted rows of one row group.
        """
        group = self._groups[number]
        start = 0
        batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * group.rows // max(1, group.size)))
        # Without pre-buffering, even a large row group is read page by page.
        with pq.ParquetFile(group.file, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(
                batch_rows, row_groups=[group.number], columns=[group.column], use_threads=False
            ):
                first, last = np.searchsorted(rows, [start, start + len(batch)]).tolist()
                if first < last:
                    yield first, _encoded(batch.column(0)).take(pa.array(rows[first:last] - start))
                start += len(batch)
                if last == len(rows):
                    return

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, "right")) - 1


def _encoded(images: pa.Array) -> pa.Array:
    """Return the encoded images of a column, struct or binary."""
    values = images.field("bytes") if pa.types.is_struct(images.type) else images
    # Arrow has no `take` for views.
    return values.cast(pa.large_binary()) if pa.types.is_binary_view(values.type) else values


def default_held_bytes() -> int:
    """Return the default of `held_bytes`: 2 GiB, or a sixteenth of the memory if that is more."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else ""
    return max(
        LEAST_HELD_BYTES, min(memory, int(limit) if limit.isdigit() else memory) // HELD_SHARE
    )
