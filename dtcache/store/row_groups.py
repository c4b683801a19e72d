"""A Parquet file whose row groups are checked and read when they are used, and then kept a while.

The manifest has the size and SHA-256 of every row group and of the footer, so that a file of
gigabytes is opened by its footer alone, and no byte is parsed that was not compared.
"""

import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dtcache.errors import AGAIN, CacheDamagedError, one_line
from dtcache.regular_files import open_regular
from dtcache.store.parquet_tables import (
    FREE_BYTES,
    GROUP_ROWS,
    TablePart,
    read_group,
    require_columns,
)

T = TypeVar("T")

KEPT_BYTES = 96 << 20
"""Bytes of decoded row groups that are kept: those of 70 row groups of 16,384 samples."""
EAGER_BYTES = 8 << 20
"""A file of at most this size is checked and read when it is opened: damage is found early."""


def unchanged(table: pa.Table) -> pa.Table:
    """Return the table."""
    return table


class RowGroups:
    """The rows of a table, by row groups of GROUP_ROWS rows. Safe to share between threads."""

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        parts: Sequence[TablePart],
        *,
        finish: Callable[[pa.Table], pa.Table] = unchanged,
        bounded: bool = True,
    ) -> None:
        """Open a file that consists of `parts`. The footer is checked, and a small file as a whole.

        `finish` checks or completes each row group after it is read.
        If `bounded`, a row group has at most FREE_BYTES and four times its bytes of values, checked
        before memory is allocated. Raises CacheDamagedError as `read_table` does, and if a part's
        size or SHA-256 is not the recorded one.
        """
        self.path = path
        """The file."""
        self._schema = schema
        self._parts = parts
        self._finish = finish
        self._bounded = bounded
        self._offsets = [0, *accumulate(part.bytes for part in parts)]
        self._forget()
        self._metadata = self._parsed(self._footer)
        if self._offsets[-1] <= EAGER_BYTES:
            for number in range(len(self)):
                self.group(number)

    def __len__(self) -> int:
        """Return the number of row groups."""
        return max(0, len(self._parts) - 1)

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return int(self._metadata.num_rows)

    def group(self, number: int) -> pa.Table:
        """Return a row group, from memory if it is kept. Raises CacheDamagedError.

        Two threads that read the same row group get equal tables.
        """
        if os.getpid() != self._process:
            self._forget()  # the lock may have been held when this process was forked
        with self._lock:
            table = self._kept.get(number)
            if table is not None:
                self._kept.move_to_end(number)
                return table
        table = self._parsed(lambda: self._read(number))
        with self._lock:
            if number not in self._kept:
                self._kept[number] = table
                self._kept_bytes += table.nbytes
                while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                    self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return table

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle holds: all but the rows that are kept."""
        return {**self.__dict__, "_lock": None, "_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._forget()

    def _forget(self) -> None:
        """Begin without rows in this process."""
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self._kept_bytes = 0
        self._process = os.getpid()

    def _parsed(self, read: Callable[[], T]) -> T:
        """Return `read()`. Raises CacheDamagedError with the path instead of its errors."""
        try:
            return read()
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            raise CacheDamagedError(
                f"{self.path}: missing or damaged ({one_line(error)}); {AGAIN}"
            ) from error

    def _footer(self) -> pq.FileMetaData:
        """Read the footer and check that it describes the columns and the row groups."""
        if not self._parts:
            raise ValueError("the manifest lists no parts of it")
        with open_regular(self.path) as handle:
            size = os.fstat(handle.fileno()).st_size
        if size != self._offsets[-1]:
            raise ValueError(f"expected {self._offsets[-1]} bytes, got {size}")
        # Alone the footer is a whole file without pages, and only it is read.
        with pq.ParquetFile(io.BytesIO(self._checked(len(self._parts) - 1))) as file:
            metadata = file.metadata
            require_columns(file.schema_arrow, self._schema)
        sizes = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        full, rest = divmod(metadata.num_rows, GROUP_ROWS)
        if sizes != [GROUP_ROWS] * full + [rest] * (rest > 0) or len(sizes) != len(self):
            raise ValueError(
                f"expected {len(self)} row groups of {GROUP_ROWS} rows, the last one shorter"
            )
        return metadata

    def _read(self, number: int) -> pa.Table:
        """Read and check a row group. Raises ValueError, OSError or Arrow's errors."""
        limit = FREE_BYTES + 4 * self._parts[number].bytes if self._bounded else None
        window = _Window(self._checked(number), self._offsets[number], self._offsets[-1])
        table = read_group(window, self._metadata, number, self._schema, limit).combine_chunks()
        first = number * GROUP_ROWS
        rows = np.arange(first, first + self._metadata.row_group(number).num_rows)
        if not np.array_equal(table["row"].to_numpy(), rows):
            raise ValueError(f"its rows from {first} on are not numbered in order")
        return self._finish(table)

    def _checked(self, number: int) -> bytes:
        """Return a part of the file after comparing its SHA-256."""
        part = self._parts[number]
        with open_regular(self.path) as handle:
            handle.seek(self._offsets[number])
            content = handle.read(part.bytes)
        got = hashlib.sha256(content).hexdigest()
        if got != part.sha256:
            raise ValueError(
                f"bytes from {self._offsets[number]} on: expected SHA-256 {part.sha256[:16]}..., "
                f"got {got[:16]}..."
            )
        return content


class _Window(io.BufferedIOBase):
    """A file of which one range of bytes is in memory; any other byte cannot be read."""

    def __init__(self, content: bytes, start: int, size: int) -> None:
        self._content = content
        self._start = start
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        begin = self._position - self._start
        end = self._size - self._start if size is None or size < 0 else begin + size
        end = min(end, self._size - self._start)
        if begin < 0 or end > len(self._content):
            raise ValueError("its footer points outside the row group")
        self._position += max(0, end - begin)
        return self._content[begin:end]
