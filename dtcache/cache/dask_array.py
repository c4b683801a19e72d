"""A tap of a whole cache as a lazy dask array.

Shape suffixes: N rows, V views, C channels, H rows, W columns.
"""

from collections.abc import Callable

import dask.array as da
import numpy as np
from dask.delayed import delayed
from numpy.typing import NDArray

CHUNK_VALUES = 1 << 23
"""Maximum values per chunk: 32 MiB of fp32."""

Decode = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Returns the features of R rows, fp32 (R, V, C, H, W). Unpickled, it opens its cache again."""


def lazy_stack(decode: Decode, shape_NVCHW: tuple[int, ...], name: str) -> da.Array:
    """Return the lazy array of `decode` over all rows, fp32 (N, V, C, H, W), in chunks of rows.

    `name` must differ from the name of every other array.
    """
    count, *row_shape = shape_NVCHW
    rows = max(1, CHUNK_VALUES // int(np.prod(row_shape)))
    numbers = da.arange(count, chunks=rows, dtype=np.int64)[:, None, None, None, None]
    stacked: da.Array = da.map_blocks(
        _decode_chunk,
        numbers,
        # A separate task, so that a worker process opens the cache once, not once per chunk.
        decode=delayed(decode, name=f"decode-{name}", traverse=False),
        dtype=np.float32,
        chunks=da.core.normalize_chunks((rows, *row_shape), shape_NVCHW),
        meta=np.empty((0,) * 5, np.float32),
        name=f"{name}-{rows}",
    )
    return stacked


def _decode_chunk(numbers: NDArray[np.int64], decode: Decode) -> NDArray[np.float32]:
    return decode(numbers.reshape(-1))
