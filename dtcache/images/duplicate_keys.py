"""Finding the first key that occurs twice, and reporting both of its images."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from dtcache.errors import ImagesError


def first_repeat(keys: pa.ChunkedArray) -> tuple[int, int] | None:
    """Return the indices of the first repeated key: of its first occurrence and of the repeat.

    Returns None if all keys are unique.
    """
    # A dictionary numbers values in order of first occurrence, so an index at which the maximum
    # does not grow is a repeat.
    codes = keys.cast(pa.large_string()).combine_chunks().dictionary_encode().indices.to_numpy()
    repeats = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1) == 0)
    if not len(repeats):
        return None
    return int(np.flatnonzero(codes == codes[repeats[0]])[0]), int(repeats[0])


def require_unique(keys: pa.ChunkedArray, describe: Callable[[int], str], remedy: str) -> None:
    """Raise ImagesError naming both images of the first repeated key.

    `describe` gives the description of an image by its index.
    """
    repeat = first_repeat(keys)
    if repeat is not None:
        first, second = repeat
        raise ImagesError(
            f"two images have the same name {keys[first].as_py()!r}: {describe(first)} and "
            f"{describe(second)}; {remedy}"
        )
