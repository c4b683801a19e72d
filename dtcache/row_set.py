"""Sets of ascending rows as ranges: 100 million rows with few gaps take a few kilobytes."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray


class RowSet(Sequence[int]):
    """Ascending distinct rows, held as disjoint ranges. Immutable."""

    __slots__ = ("_ends", "_starts", "_stops")

    def __init__(self, starts: ArrayLike, stops: ArrayLike) -> None:
        """Hold the rows start <= row < stop of each range; ranges ascend and do not overlap."""
        self._starts = np.asarray(starts, np.int64)
        self._stops = np.asarray(stops, np.int64)
        self._ends: NDArray[np.int64] = np.cumsum(self._stops - self._starts, dtype=np.int64)
        """Number of rows up to the end of each range."""

    @classmethod
    def of(cls, rows: ArrayLike) -> "RowSet":
        """Return the set of `rows`, which ascend. Raises ValueError if they do not."""
        values = np.asarray(rows, np.int64)
        steps = np.diff(values)
        if (steps <= 0).any():
            raise ValueError("expected ascending rows")
        edges = np.flatnonzero(steps > 1) + 1
        starts = values[np.concatenate([[0], edges])] if len(values) else values
        stops = values[np.concatenate([edges - 1, [-1]])] + 1 if len(values) else values
        return cls(starts, stops)

    @classmethod
    def all_but(cls, count: int, starts: ArrayLike, stops: ArrayLike) -> "RowSet":
        """Return range(count) without the given ranges, which may overlap and have any order."""
        begin = np.asarray(starts, np.int64)
        end = np.asarray(stops, np.int64)
        order = np.argsort(begin, kind="stable")
        ends = np.maximum.accumulate(np.concatenate([[0], end[order]]))
        begins = np.concatenate([begin[order], [count]])
        gaps = begins > ends
        return cls(ends[gaps], begins[gaps])

    @classmethod
    def joined(cls, parts: Sequence[tuple[int, "RowSet"]]) -> "RowSet":
        """Return the rows of all parts, each moved up by its number; parts do not overlap."""
        return cls(
            np.concatenate([first + rows._starts for first, rows in parts]),
            np.concatenate([first + rows._stops for first, rows in parts]),
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __contains__(self, row: object) -> bool:
        """Return whether the set has a row."""
        return isinstance(row, int | np.integer) and bool(self.has([int(row)])[0])

    def __iter__(self) -> Iterator[int]:
        """Yield the rows, ascending."""
        for start, stop in zip(self._starts.tolist(), self._stops.tolist(), strict=True):
            yield from range(start, stop)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> "RowSet": ...
    def __getitem__(self, index: int | slice) -> "int | RowSet":
        """Return the row at a position, or the set of the rows of a slice with step 1."""
        if not isinstance(index, slice):
            return int(self.take([range(len(self))[index]])[0])
        begin, end, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"expected a slice with step 1, got {step}")
        if begin >= end:
            return RowSet([], [])
        first = int(np.searchsorted(self._ends, begin, side="right"))
        last = int(np.searchsorted(self._ends, end - 1, side="right")) + 1
        starts = self._starts[first:last].copy()
        stops = self._stops[first:last].copy()
        starts[0] = self[begin]
        stops[-1] = self[end - 1] + 1
        return RowSet(starts, stops)

    def take(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Return the rows at positions in 0..len - 1, int64, in their order."""
        places = np.asarray(positions, np.int64)
        number = np.searchsorted(self._ends, places, side="right")
        rows: NDArray[np.int64] = self._stops[number] - (self._ends[number] - places)
        return rows

    def has(self, rows: ArrayLike) -> NDArray[np.bool_]:
        """Return for each of `rows` whether the set has it."""
        values = np.asarray(rows, np.int64)
        return self.rank(values + 1) > self.rank(values)

    def rank(self, edges: ArrayLike) -> NDArray[np.int64]:
        """Return for each edge the number of rows below it, int64."""
        values = np.asarray(edges, np.int64)
        if not len(self._starts):
            return np.zeros(values.shape, np.int64)
        number = np.searchsorted(self._starts, values, side="right") - 1
        safe = np.maximum(number, 0)
        beyond = np.maximum(self._stops[safe] - values, 0)
        return np.where(number < 0, 0, self._ends[safe] - beyond)

    def array(self) -> NDArray[np.int64]:
        """Return all rows, int64, ascending."""
        return self.take(np.arange(len(self)))
