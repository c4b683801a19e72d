"""The number and the choice of held-out samples follow from a hash of the keys alone."""

import random

import pytest

from dtcache.cache.selection import held_out
from dtcache.hashing import sha256_json


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (0, 0),
        (1, 0),
        (2, 1),
        (9, 4),
        (127, 63),
        (128, 64),
        (129, 64),
        (1000, 64),
        (6400, 64),
        (6599, 65),
        (12_345, 123),
    ],
)
def test_held_out_count(count: int, wanted: int) -> None:
    """One per cent is held out, at least 64 and at most half, at sorted unique positions."""
    places = held_out([f"image{i}" for i in range(count)])
    assert len(places) == wanted
    assert places == sorted(set(places))
    assert all(0 <= p < count for p in places)


def test_held_out_ignores_order() -> None:
    """The same keys are held out in any order of the samples, and they are not the first ones."""
    keys = [f"folder/{i}.png" for i in range(500)]
    wanted = {keys[p] for p in held_out(keys)}
    for seed in range(5):
        shuffled = random.Random(seed).sample(keys, len(keys))
        assert {shuffled[p] for p in held_out(shuffled)} == wanted
    assert wanted != set(sorted(keys)[:64])


def test_held_out_hashes_canonical_json() -> None:
    """Keys with any characters are ranked by the hash of the canonical JSON of purpose and key."""
    keys = [f'n{i}/\u00fc"\\\n\x7f\u65e5\U0001f600{i}.png' for i in range(300)]
    ranked = sorted(range(300), key=lambda i: sha256_json(["held-out", keys[i]]))
    assert held_out(keys) == sorted(ranked[:64])
    assert held_out([]) == held_out(["one"]) == []
