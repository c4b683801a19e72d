"""Sets of rows as ranges equal NumPy's sets of the same rows."""

import numpy as np
import pytest

from dtcache.row_set import RowSet


@pytest.mark.parametrize("seed", range(20))
def test_a_row_set_is_the_array_of_its_rows(seed: int) -> None:
    """Length, positions, membership, ranks and slices are those of the sorted array."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 60))
    starts = rng.integers(0, count, rng.integers(0, 9))
    stops = np.minimum(starts + rng.integers(0, 9, len(starts)), count)
    left = np.ones(count, bool)
    for start, stop in zip(starts, stops, strict=True):
        left[start:stop] = False
    rows = np.flatnonzero(left)
    found = RowSet.all_but(count, starts, stops)
    assert found.array().tolist() == list(found) == rows.tolist()
    assert RowSet.of(rows).array().tolist() == rows.tolist()
    assert len(found) == len(rows)
    every = np.arange(-2, count + 3)
    assert found.has(every).tolist() == np.isin(every, rows).tolist()
    assert found.rank(every).tolist() == [int((rows < edge).sum()) for edge in every]
    assert [row in found for row in every.tolist()] == np.isin(every, rows).tolist()
    for begin, end in rng.integers(-count, count + 1, (8, 2)).tolist():
        assert found[begin:end].array().tolist() == rows[begin:end].tolist()
    if len(rows):
        places = rng.integers(0, len(rows), 7)
        assert found.take(places).tolist() == rows[places].tolist()
        assert [found[int(place)] for place in places] == rows[places].tolist()
        assert found[-1] == rows[-1]


def test_a_row_set_refuses_another_order() -> None:
    """Rows that do not ascend, and slices with a step, raise ValueError."""
    with pytest.raises(ValueError, match="expected ascending rows"):
        RowSet.of([2, 1])
    with pytest.raises(ValueError, match="expected ascending rows"):
        RowSet.of([1, 1])
    with pytest.raises(ValueError, match="expected a slice with step 1, got 2"):
        RowSet([0], [9])[::2]
