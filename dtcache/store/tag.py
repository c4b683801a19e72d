"""The tag of a payload: a checksum over its content and its place, which begins the payload.

Zarr's checksum of a chunk proves the chunk's bytes, but not where the chunk belongs. The tag also
covers the cache, the array, the row and the view, so a payload that was moved is never used.
"""

import numpy as np
from google_crc32c import extend
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from dtcache.errors import CacheDamagedError

TAG_BYTES = 4


def tag_seed(fingerprint: str, array: str) -> int:
    """Return the CRC-32C of a cache's fingerprint and an array's name, with which tags begin."""
    seed: int = crc32c(f"{fingerprint}{array}".encode())
    return seed


def tagged(seed: int, row: int, view: int, content: bytes) -> bytes:
    """Return the payload of (row, view): the tag and the content. Empty content stays empty."""
    if not content:
        return b""
    return _tag(seed, row, view, content) + content


def untagged(seed: int, row: int, view: int, payload_L: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the content of a payload padded with zeros; it is empty if all bytes are zeros.

    Raises CacheDamagedError if the tag is not that of the content and its place.
    """
    if not payload_L.any():
        return payload_L[:0]
    content = payload_L[TAG_BYTES:]
    if payload_L[:TAG_BYTES].tobytes() != _tag(seed, row, view, content.tobytes()):
        raise CacheDamagedError("it is not the payload of this cache, array, row and view")
    return content


def _tag(seed: int, row: int, view: int, content: bytes) -> bytes:
    """Return the tag: a CRC-32C, continued from `seed`. Zeros at the end do not count: they pad."""
    place = row.to_bytes(8, "little") + view.to_bytes(4, "little")
    tag: int = extend(seed, place + content.rstrip(b"\0"))
    return tag.to_bytes(TAG_BYTES, "little")
