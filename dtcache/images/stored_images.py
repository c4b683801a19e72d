"""Images in a cache: the source's bytes if the view changes no pixel, else lossless WebP."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dtcache.errors import BadImageError
from dtcache.images.decode import decode_view
from dtcache.images.view_loader import LoadedView
from dtcache.recipe import ViewSpec

LENGTH_BYTES = 4
CONTAINER: dict[str, Any] = {"lossless": True, "method": 2, "quality": 20}
"""WebP options. The default method, 4, saves about 4 % of the bytes in over four times the time."""


def image_bound(view: ViewSpec) -> int:
    """Return the maximum bytes of a stored image: its raw pixels, and room for a container."""
    return -(-(view.height * view.width * 3 + 1024) // 16) * 16


def encode_stored(loaded: LoadedView, bound: int) -> bytes:
    """Return a payload: the length (uint32, little-endian) and an image file.

    The file decodes to exactly the view's pixels. If the source's bytes exceed `bound`, for example
    because of metadata, the image is encoded again.
    """
    data = loaded.source
    if not loaded.unchanged or len(data) + LENGTH_BYTES > bound:
        if loaded.pixels_CHW is None:
            raise BadImageError(loaded.failure or "no pixels")
        sink = io.BytesIO()
        Image.fromarray(loaded.pixels_CHW.transpose(1, 2, 0)).save(sink, "WEBP", **CONTAINER)
        data = sink.getvalue()
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


def decode_stored(payload_L: NDArray[np.uint8], view: ViewSpec) -> NDArray[np.uint8]:
    """Return the view's uint8 pixels (3, H, W) from a payload, with or without padding.

    Raises BadImageError.
    """
    length = int.from_bytes(payload_L[:LENGTH_BYTES].tobytes(), "little")
    if not 0 < length <= len(payload_L) - LENGTH_BYTES:
        raise BadImageError(
            f"a stored image of {length} bytes does not fit into its payload of {len(payload_L)} "
            "bytes"
        )
    data = payload_L[LENGTH_BYTES : LENGTH_BYTES + length].tobytes()
    pixels_CHW, unchanged = decode_view(data, view, stored=True)
    if not unchanged:
        raise BadImageError(
            f"a stored image does not have the view's size, {view.height}x{view.width}"
        )
    return pixels_CHW
