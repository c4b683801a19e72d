"""Lists of samples in Arrow columns: a million keys and labels in a few dozen bytes each."""

from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtcache.recipe import Sample

T = TypeVar("T")


class Column(Sequence[T]):
    """An Arrow array as a sequence; a value becomes a Python object when it is read."""

    __slots__ = ("arrow",)

    def __init__(self, arrow: pa.Array | pa.ChunkedArray) -> None:
        self.arrow = arrow

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self.arrow)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "Column[T]": ...
    def __getitem__(self, index: int | slice) -> "T | Column[T]":
        """Return one value, or a slice that shares the memory."""
        if isinstance(index, slice):
            return Column(self.arrow[index])
        value: T = self.arrow[int(index)].as_py()
        return value

    def __iter__(self) -> Iterator[T]:
        """Yield the values in order."""
        return (value.as_py() for value in self.arrow)


class SampleList(Sequence[Sample]):
    """The samples of a cache in row order: indices into a source, and the source's own columns."""

    __slots__ = ("_labels", "indices", "source_keys")

    def __init__(
        self, keys: Sequence[str], labels: Sequence[int | None] | None, indices: NDArray[np.int64]
    ) -> None:
        """List the samples at `indices` of a source that has these keys and labels."""
        self.source_keys = keys
        self._labels = labels
        self.indices = indices

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> "SampleList": ...
    def __getitem__(self, row: int | slice) -> "Sample | SampleList":
        """Return one sample, or a slice that shares the memory."""
        if isinstance(row, slice):
            return SampleList(self.source_keys, self._labels, self.indices[row])
        index = int(self.indices[row])
        return Sample(
            index=index,
            key=self.source_keys[index],
            label=self._labels[index] if self._labels is not None else None,
        )
