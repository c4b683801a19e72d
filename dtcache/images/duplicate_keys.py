"""Keys that must be unique: finding the first that is not, and saying where both are."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from dtcache.errors import ImagesError


def first_repeat(keys: pa.ChunkedArray) -> tuple[int, int] | None:
    """Return the places of the first key that was there before, and of its first time; None where
    all are unique.
    """
    # A dictionary numbers values as they first come, so that a place where the highest number stays
    # is a repeat.
    codes = keys.cast(pa.large_string()).combine_chunks().dictionary_encode().indices.to_numpy()
    repeats = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1) == 0)
    if not len(repeats):
        return None
    return int(np.flatnonzero(codes == codes[repeats[0]])[0]), int(repeats[0])


def require_unique(keys: pa.ChunkedArray, place: Callable[[int], str], remedy: str) -> None:
    """Raise ImagesError naming both places of the first key that comes twice."""
    repeat = first_repeat(keys)
    if repeat is not None:
        first, second = repeat
        raise ImagesError(
            f"two images have the same name {keys[first].as_py()!r}: {place(first)} and "
            f"{place(second)}; {remedy}"
        )
