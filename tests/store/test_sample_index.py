"""The sample index has stable hashes and one fixed Parquet encoding."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from store.builders import sample_table

from dtcache.recipe import Sample
from dtcache.samples import SampleList
from dtcache.store.parquet_tables import parquet_bytes, read_table
from dtcache.store.sample_index import SCHEMA, changed_samples, hash_samples, samples_table


def test_hash_samples_covers_order_keys_and_labels() -> None:
    """The list's hash depends on its order, keys and labels, but not on the source's order."""
    samples = [Sample(index=i, key=f"k{i}", label=i % 2) for i in range(5)]
    hashes = {
        hash_samples(samples),
        hash_samples(samples[::-1]),
        hash_samples(samples[:4]),
        hash_samples([*samples[:4], Sample(index=4, key="k5", label=0)]),
        hash_samples([*samples[:4], Sample(index=4, key="k4", label=1)]),
        hash_samples([*samples[:4], Sample(index=4, key="k4")]),
    }
    assert len(hashes) == 6
    assert (
        hash_samples([Sample(index=9 - s.index, key=s.key, label=s.label) for s in samples])
        in hashes
    )


def test_samples_table_round_trips(tmp_path: Path) -> None:
    """pyarrow reads rows, keys, labels, hashes and failures as written, in the declared schema."""
    path = tmp_path / "samples.parquet"
    path.write_bytes(parquet_bytes(sample_table()))
    found = read_table(path, SCHEMA)
    assert found.schema.equals(SCHEMA)
    assert found.to_pydict() == {
        "row": [0, 1, 2],
        "key": ["a", "b/ü", "c"],
        "label": [1, None, 3],
        "content_sha256": [b"x" * 32, None, b"\0" * 32],
        "failure": [None, "broken", None],
    }
    assert pq.read_table(path).equals(found)


WAS = ["ant/1", "ant/2", "bee/1", "bee/2"]
LABELS = [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("keys", "labels", "order", "what"),
    [
        (
            ["ant/1", "ant/2", "ant/3", "ant/4", "bee/1", "bee/2"],
            [0, 0, 0, 0, 1, 1],
            [5, 3, 1, 0, 2, 4],
            "2 images were added (first ant/3)",
        ),
        (WAS[1:], LABELS[1:], [2, 0, 1], "1 image was removed (first ant/1)"),
        (
            ["ant/0", "ant/2", "bee/1", "bee/2"],
            LABELS,
            [0, 1, 2, 3],
            "1 image was added (first ant/0) and 1 image was removed (first ant/1)",
        ),
        (
            WAS,
            [0, 0, 2, 1],
            [2, 0, 3, 1],
            "labels changed, of 1 images (such as bee/1: 1 in the cache, 2 now)",
        ),
        (
            WAS,
            [0, 0, 1, None],
            [2, 0, 3, 1],
            "labels changed, of 1 images (such as bee/2: 1 in the cache, None now)",
        ),
        (WAS, LABELS, [3, 0, 2, 1], "the order of the images changed"),
        (WAS, LABELS, [2, 0], "the cache has 4 of the images, 2 are selected now (`limit`)"),
        (
            [*WAS, "cow/1"],
            [*LABELS, 2],
            [4, 1],
            "`limit` selects other images of the 5 that the source has now",
        ),
        ([*WAS[1:], "cow/1"], [*LABELS[1:], 2], [3, 1], "1 image was removed (first ant/1)"),
    ],
    ids=[
        "more",
        "fewer",
        "renamed",
        "label",
        "lost label",
        "order",
        "limit",
        "more and limit",
        "fewer and limit",
    ],
)
def test_what_changed_in_a_data_set_is_named(
    keys: list[str], labels: list[int | None], order: list[int], what: str
) -> None:
    """Added and removed images are named first, then changed labels, then a changed order."""
    was = samples_table([WAS[i] for i in (2, 0, 3, 1)], [LABELS[i] for i in (2, 0, 3, 1)])
    assert changed_samples(was, SampleList(keys, labels, np.array(order))) == what


def test_a_new_class_shifts_the_labels_after_it() -> None:
    """A new class reports both the added images and the labels that shifted."""
    was = samples_table(WAS, LABELS)
    now = SampleList(
        ["ant/1", "ant/2", "ape/1", "bee/1", "bee/2"], [0, 0, 1, 2, 2], np.array([4, 3, 2, 1, 0])
    )
    assert changed_samples(was, now) == (
        "1 image was added (first ape/1) and labels changed, of 2 images (such as bee/2: 1 in the "
        "cache, "
        "2 now)"
    )


def test_renamed_unicode_forms_are_told() -> None:
    """Names that changed from one Unicode form to another are neither added nor removed."""
    was = samples_table(["caf\u00e9.jpg", "b.jpg"], [0, 1])
    now = SampleList(["cafe\u0301.jpg", "b.jpg"], [0, 1], np.array([0, 1]))
    assert changed_samples(was, now) == (
        "1 image was renamed (first cafe\u0301.jpg), from one Unicode form to another"
    )
