"""The fitted arrays of a cache's codec: one safetensors file, compressed with Zstandard."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from zstandard import ZstdCompressor, ZstdDecompressor, ZstdError, get_frame_parameters

from dtcache.regular_files import read_regular
from dtcache.store.layout import CODEC

DTYPES = {
    "pca-dct-rans": {
        "basis": "<f2",
        "mean": "<f2",
        "classes": "|u1",
        "class_step": "<f4",
        "class_gain": "<f4",
        "class_table": "|u1",
        "tables": "<u2",
        "half_width": "|u1",
    },
    "float16": {"mean": "<f2", "grid": "<i4"},
}
"""Array dtypes by codec."""
LEVEL = 12
MAX_HEADER_BYTES = 1 << 20
"""Most bytes of the safetensors header: names, dtypes and shapes."""

Fit = Mapping[str, Mapping[str, NDArray[np.generic]]]
"""Arrays by tap and name."""


def codec_bytes(fit: Fit) -> bytes:
    """Return the content of the file: tensors named `t150/stride8/basis`, compressed."""
    tensors = {
        f"{tap}/{name}": np.ascontiguousarray(values)
        for tap, arrays in fit.items()
        for name, values in arrays.items()
    }
    return ZstdCompressor(level=LEVEL).compress(save(tensors))


def read_fit(
    root: Path, codec: str, most: Mapping[str, int]
) -> dict[str, dict[str, NDArray[np.generic]]]:
    """Read the codec's arrays by tap and name.

    `codec` is the name in the recipe. `most` has the most bytes of one array by tap. Raises OSError
    if the file cannot be read, KeyError for another codec, and ValueError if the file is not what
    `codec_bytes` returns for these taps; a larger file is refused before memory is allocated.
    """
    path = root / CODEC
    dtypes = DTYPES[codec]
    limit = MAX_HEADER_BYTES + len(dtypes) * sum(most.values())
    try:
        packed = read_regular(path, limit)
        size = get_frame_parameters(packed).content_size
        if size > limit:
            raise ValueError(f"expected at most {limit} bytes, got {size}")
        tensors = load(ZstdDecompressor().decompress(packed, allow_extra_data=False))
    except (ValueError, ZstdError, SafetensorError, KeyError) as error:
        # KeyError: safetensors has a type that NumPy lacks.
        raise ValueError(f"{path}: {error}") from error
    names = {f"{tap}/{name}" for tap in most for name in dtypes}
    if tensors.keys() != names:
        odd = min(tensors.keys() ^ names)
        raise ValueError(
            f"{path}: expected the arrays of {len(most)} taps, "
            f"got {'no ' if odd in names else ''}{odd[:80]!r}"
        )
    for name, values in tensors.items():
        tap, _, array = name.rpartition("/")
        if values.dtype != dtypes[array] or values.nbytes > most[tap]:
            raise ValueError(
                f"{path}: {name}: expected at most {most[tap]} bytes of {dtypes[array]}, "
                f"got {values.nbytes} of {values.dtype.str}"
            )
    return {tap: {array: tensors[f"{tap}/{array}"] for array in dtypes} for tap in most}
