"""The bytes of one Zarr v3 shard (ZEP 2, `sharding_indexed`): inner chunks, then their index.

Each chunk and the index end in their CRC-32C.
"""

from collections.abc import Sequence

import numpy as np
from google_crc32c import value as crc32c
from numcodecs.zstd import decompress
from numpy.typing import NDArray
from zstandard import ZstdError, get_frame_parameters

from dtcache.errors import CacheDamagedError, CodecError
from dtcache.store.layout import PayloadArray
from dtcache.store.tag import TAG_BYTES, tagged
from dtcache.store.zstd_frame import pack_frame

CRC_BYTES = 4
ENTRY_BYTES = 16
ABSENT = np.uint64(2**64 - 1)
"""Offset and size of a chunk beyond the edge of the array."""


def build_shard(array: PayloadArray, shard: int, contents: Sequence[bytes]) -> bytes:
    """Return a shard of an array from the contents of its payloads, row by row and view by view.

    Each payload is tagged and padded with zeros. Every payload is written, one without content as
    zeros; entries after the last payload are ABSENT. So an absent chunk within the array means
    damage. Raises CodecError for a payload longer than the array's L.
    """
    entries = array.shard_rows * array.payloads_per_row
    longest = TAG_BYTES + max(map(len, contents), default=0)
    if longest > array.length or len(contents) > entries:
        raise CodecError(
            f"a shard of {len(contents)} payloads of up to {longest} bytes exceeds {entries} of "
            f"{array.length}"
        )
    first = array.rows_of(shard).start
    seed = array.tag_seed
    index = np.full((entries, 2), ABSENT, "<u8")
    parts: list[bytes] = []
    offset = 0
    for i, content in enumerate(contents):
        inner, view = divmod(i, array.payloads_per_row)
        payload = tagged(seed, first + inner, view, content)
        packed = pack_frame(payload, array.length)
        chunk = packed + crc32c(packed).to_bytes(CRC_BYTES, "little")
        parts.append(chunk)
        index[i] = offset, len(chunk)
        offset += len(chunk)
    table = index.tobytes()
    return b"".join([*parts, table, crc32c(table).to_bytes(CRC_BYTES, "little")])


def index_bytes(entries: int) -> int:
    """Return the bytes of a shard's index."""
    return entries * ENTRY_BYTES + CRC_BYTES


def max_chunk_bytes(length: int) -> int:
    """Return an upper bound of the bytes of a chunk whose payload is padded to `length` bytes.

    It covers our frames and those of any zstd, which adds at most one byte per 256.
    """
    return length + length // 256 + 512


def shard_bounds(array: PayloadArray) -> range:
    """Return the sizes in bytes that a shard's file can have."""
    entries = array.shard_rows * array.payloads_per_row
    tail = index_bytes(entries)
    return range(tail, tail + entries * max_chunk_bytes(array.length) + 1)


def parse_index(tail: bytes, array: PayloadArray, size: int) -> NDArray[np.uint64]:
    """Return (entries, 2) offsets and sizes from a shard's last bytes; an entry may be ABSENT.

    Raises CacheDamagedError if the checksum fails, if an entry points outside a shard of `size`
    bytes, if a chunk is larger than `max_chunk_bytes`, or if two chunks overlap. So chunks that
    differ never take more memory than the file has bytes.
    """
    entries = array.shard_rows * array.payloads_per_row
    table = tail[:-CRC_BYTES]
    checksum = tail[-CRC_BYTES:]
    if len(tail) != index_bytes(entries) or crc32c(table) != int.from_bytes(checksum, "little"):
        raise CacheDamagedError("the shard's index is damaged")
    index = np.frombuffer(table, "<u8").reshape(entries, 2)
    present = index[index[:, 0] != ABSENT]
    offsets, sizes = present[np.argsort(present[:, 0])].T
    end = np.uint64(max(0, size - len(tail)))
    if bool(((offsets > end) | (sizes > end - np.minimum(offsets, end))).any()):
        raise CacheDamagedError("the shard's index points outside the file")
    if bool((sizes > max_chunk_bytes(array.length)).any()):
        raise CacheDamagedError(
            f"the shard's index has a chunk of {sizes.max()} bytes for a payload of {array.length}"
        )
    if bool((offsets[:-1] + sizes[:-1] > offsets[1:]).any()):
        raise CacheDamagedError("the shard's index has chunks that overlap")
    return index


def unpack_chunk(chunk: bytes, out: NDArray[np.uint8]) -> None:
    """Check one inner chunk and decompress it into `out` (L,).

    Raises CacheDamagedError if a byte is wrong.
    """
    packed = chunk[:-CRC_BYTES]
    checksum = chunk[-CRC_BYTES:]
    if len(chunk) <= CRC_BYTES or crc32c(packed) != int.from_bytes(checksum, "little"):
        raise CacheDamagedError("the checksum does not match")
    try:
        # Checked before memory is allocated: a small frame can claim any size.
        size = get_frame_parameters(packed).content_size
        if size != len(out):
            raise CacheDamagedError(f"it decompresses to {size} bytes instead of {len(out)}")
        decompress(packed, out)
    except (ZstdError, RuntimeError) as error:
        raise CacheDamagedError(f"it does not decompress ({error})") from error
