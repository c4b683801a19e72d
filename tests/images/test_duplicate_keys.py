"""The first repeated key is found, however the keys are split into chunks."""

import random

import pyarrow as pa
import pytest

from dtcache.errors import ImagesError
from dtcache.images.duplicate_keys import first_repeat, require_unique


@pytest.mark.parametrize("seed", range(30))
def test_the_first_repeat_is_found(seed: int) -> None:
    """The result equals that of a loop with a dictionary."""
    rng = random.Random(seed)
    keys = [str(rng.randrange(60)) for _ in range(rng.randrange(1, 30))]
    seen: dict[str, int] = {}
    wanted = next(
        ((seen[key], i) for i, key in enumerate(keys) if seen.setdefault(key, i) != i), None
    )
    cut = rng.randrange(len(keys) + 1)
    assert first_repeat(pa.chunked_array([keys[:cut], keys[cut:]], pa.string())) == wanted


def test_both_places_are_named() -> None:
    """The message names the key, both of its images and a remedy."""
    keys = pa.chunked_array([["a", "b"], ["c", "b"]])
    with pytest.raises(
        ImagesError, match=r"two images have the same name 'b': place 1 and place 3; rename one"
    ):
        require_unique(keys, lambda i: f"place {i}", "rename one")
    require_unique(keys[:3], str, "")
