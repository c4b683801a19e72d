"""Columns and sample lists behave like the lists that they represent."""

import numpy as np
import pyarrow as pa
import pytest

from dtcache.recipe import Sample
from dtcache.samples import Column, SampleList
from dtcache.store.sample_index import hash_samples

KEYS = [f"class/{number:02}.png" for number in range(20)]
LABELS = [number % 3 if number else None for number in range(20)]


def columns(parts: int) -> tuple[Column[str], Column[int | None]]:
    """Return keys and labels as Arrow arrays in `parts` chunks."""
    cuts = [slice(i * 20 // parts, (i + 1) * 20 // parts) for i in range(parts)]
    return (
        Column(pa.chunked_array([KEYS[cut] for cut in cuts], pa.string())),
        Column(pa.chunked_array([LABELS[cut] for cut in cuts], pa.int32())),
    )


@pytest.mark.parametrize("parts", [1, 3])
def test_a_column_reads_like_a_list(parts: int) -> None:
    """A column has a list's length, indexing, slices, order and search."""
    column, labels = columns(parts)
    assert (len(column), list(column), list(labels)) == (20, KEYS, LABELS)
    assert [column[i] for i in (0, 7, -1)] == [KEYS[i] for i in (0, 7, -1)]
    assert column[np.int64(5)] == KEYS[5]
    assert list(column[3:9]) == KEYS[3:9]
    assert column.index(KEYS[11]) == 11
    with pytest.raises(IndexError):
        column[20]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_sample_list_reads_like_a_list_of_samples(labelled: bool) -> None:
    """A sample list's rows follow its indices, and its hash is that of the equal list."""
    keys, labels = columns(2)
    order = np.random.default_rng(0).permutation(20)[:12]
    listed = SampleList(keys, labels if labelled else None, order)
    wanted = [
        Sample(index=int(i), key=KEYS[i], label=LABELS[i] if labelled else None) for i in order
    ]
    assert len(listed) == 12
    assert list(listed) == wanted
    assert list(listed[2:5]) == wanted[2:5]
    assert listed[-1] == wanted[-1]
    assert hash_samples(listed) == hash_samples(wanted)
