"""Samples as columns: a million names and labels in a few dozen bytes each, read like lists."""

from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtcache.recipe import Sample

T = TypeVar("T")


class Column(Sequence[T]):
    """An Arrow array, read as a sequence of Python values that are made when asked for."""

    __slots__ = ("arrow",)

    def __init__(self, arrow: pa.Array | pa.ChunkedArray) -> None:
        self.arrow = arrow

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self.arrow)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> "Column[T]": ...
    def __getitem__(self, place: int | slice) -> "T | Column[T]":
        """Return one value, or a part that shares the memory."""
        if isinstance(place, slice):
            return Column(self.arrow[place])
        value: T = self.arrow[int(place)].as_py()
        return value

    def __iter__(self) -> Iterator[T]:
        """Yield the values in order."""
        return (value.as_py() for value in self.arrow)


class SampleList(Sequence[Sample]):
    """The samples of a cache in row order: places in a source, and the source's own columns."""

    __slots__ = ("_labels", "indices", "source_keys")

    def __init__(
        self, keys: Sequence[str], labels: Sequence[int | None] | None, indices: NDArray[np.int64]
    ) -> None:
        """List the places `indices` of a source with these keys and labels."""
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
        """Return one sample, or a part that shares the memory."""
        if isinstance(row, slice):
            return SampleList(self.source_keys, self._labels, self.indices[row])
        index = int(self.indices[row])
        return Sample(
            index=index,
            key=self.source_keys[index],
            label=self._labels[index] if self._labels is not None else None,
        )
