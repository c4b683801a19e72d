"""The reader's hot path: one numba kernel per (array, batch) reads, checks and unwraps every chunk.

Chunks are read with pread instead of mmap. A file that shrinks or a disk that fails gives an error
here; with mmap it kills the process by SIGBUS. A cold disk reads only the chunk; a page fault also
reads around it. Only the batch is in memory. The cost is about half a microsecond per chunk more
than mmap.

Importing this module loads numba, so readers import it at their first read, not when they open a
cache.
"""

import numpy as np
from numba import int32, int64, intp, types, uint8, uint32, uint64, uintp
from numpy.typing import NDArray

from dtcache.kernels import kernel
from dtcache.store.shard import CRC_BYTES
from dtcache.store.tag import TAG_BYTES
from dtcache.store.zstd_frame import BLOCK_HEADER, MAX_BLOCK, RAW, RLE

POLYNOMIAL = 0x82F63B78
"""The Castagnoli polynomial, bits reversed."""

_pread = types.ExternalFunction("pread", intp(int32, intp, uintp, int64))


def _crc_tables() -> NDArray[np.uint32]:
    """Return the tables of slicing-by-8, uint32 (8, 256).

    Row k advances the checksum by a byte that k more bytes follow.
    """
    row = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        row = np.where(row & 1, row >> 1 ^ np.uint32(POLYNOMIAL), row >> 1).astype(np.uint32)
    rows = [row]
    for _ in range(7):
        rows.append(rows[-1] >> 8 ^ row[rows[-1] & 255])
    return np.stack(rows)


_TABLES = _crc_tables()
_BYTE = uint64(255)


@kernel
def gather(  # type: ignore[no-untyped-def]
    todo, handles, offsets, sizes, places, rows, views, seed, head, length, data, done, used
):
    """Read and check the chunks `todo`; leave the payload of each in one piece in `data`.

    Chunk i = todo[k] is `sizes[i]` bytes at `offsets[i]` of the file `handles[k]`, and is read to
    `places[i]`. If its frame is one of `pack_frame`'s (it begins with `head` and decompresses to
    `length` bytes) and the tag, which continues `seed`, is that of the content and of row and view,
    done[i] becomes True and used[i] the size of the content. The payload begins `len(head)` plus
    one block header after `places[i]`, with its tag. All other chunks are left to the slower path,
    which reads every frame and reports every error.

    The chunk's own checksum is not compared here: the tag is as strong a checksum of the content,
    and every other byte of such a frame has only one value that passes.
    """
    words = data.view(np.uint64)
    for k in range(len(todo)):
        i = todo[k]
        begin = places[i]
        size = sizes[i]
        if (
            size <= CRC_BYTES
            or _pread(handles[k], data.ctypes.data + begin, size, offsets[i]) != size
        ):
            continue
        payload = _unwrap(data, begin, begin + size - CRC_BYTES, head, length)
        if payload == 0:  # a failed sample
            done[i] = True
        elif payload > TAG_BYTES:
            at = begin + len(head) + BLOCK_HEADER
            stored = uint32(data[at]) | uint32(data[at + 1]) << 8 | uint32(data[at + 2]) << 16
            stored |= uint32(data[at + 3]) << 24
            end = at + payload
            while end > at + TAG_BYTES and data[end - 1] == 0:  # the zeros that pad a payload
                end -= 1
            crc = _place(uint64(seed) ^ uint64(0xFFFFFFFF), rows[i], views[i])
            used[i] = payload - TAG_BYTES
            done[i] = uint32(stored) == finish(advance(crc, data, words, at + TAG_BYTES, end))


@kernel
def _place(crc, row, view):  # type: ignore[no-untyped-def]
    """Advance a CRC-32C by a row (8 bytes) and a view (4 bytes)."""
    for number, count in ((row, 8), (view, 4)):
        for k in range(count):
            byte = uint64(number) >> uint64(8 * k) & _BYTE
            crc = uint64(_TABLES[0, (crc ^ byte) & _BYTE]) ^ crc >> uint64(8)
    return crc


@kernel
def finish(crc):  # type: ignore[no-untyped-def]
    """Return the checksum of a CRC-32C in progress."""
    return uint32(crc ^ uint64(0xFFFFFFFF))


@kernel
def advance(crc, data, words, begin, end):  # type: ignore[no-untyped-def]
    """Advance a CRC-32C by data[begin:end], eight bytes at a time; `words` is `data` as uint64."""
    at = uint64(begin)
    end = uint64(end)
    while at < end and at & uint64(7):
        crc = uint64(_TABLES[0, (crc ^ uint64(data[at])) & _BYTE]) ^ crc >> uint64(8)
        at += uint64(1)
    while at + uint64(8) <= end:
        x = words[at >> uint64(3)] ^ crc
        crc = uint64(_TABLES[7, x & _BYTE]) ^ uint64(_TABLES[6, x >> uint64(8) & _BYTE])
        crc ^= uint64(_TABLES[5, x >> uint64(16) & _BYTE]) ^ uint64(
            _TABLES[4, x >> uint64(24) & _BYTE]
        )
        crc ^= uint64(_TABLES[3, x >> uint64(32) & _BYTE]) ^ uint64(
            _TABLES[2, x >> uint64(40) & _BYTE]
        )
        crc ^= uint64(_TABLES[1, x >> uint64(48) & _BYTE]) ^ uint64(_TABLES[0, x >> uint64(56)])
        at += uint64(8)
    while at < end:
        crc = uint64(_TABLES[0, (crc ^ uint64(data[at])) & _BYTE]) ^ crc >> uint64(8)
        at += uint64(1)
    return crc


@kernel
def _unwrap(data, begin, end, head, length):  # type: ignore[no-untyped-def]
    """Join the Raw blocks of the frame data[begin:end] and return their size.

    Returns -1 if the frame is not one of `pack_frame`'s.
    """
    if end - begin < len(head) + BLOCK_HEADER:
        return -1
    for k in range(len(head)):
        if data[begin + k] != head[k]:
            return -1
    at = begin + len(head)
    target = at + BLOCK_HEADER
    payload = 0
    zeros = 0
    last = False
    while not last:
        if end - at < BLOCK_HEADER:
            return -1
        header = int64(data[at]) | int64(data[at + 1]) << 8 | int64(data[at + 2]) << 16
        last = header & 1 == 1
        kind = header >> 1 & 3
        size = header >> 3
        at += BLOCK_HEADER
        if size > MAX_BLOCK or payload + zeros + size > length:
            return -1
        if kind == RAW and zeros == 0 and size <= end - at:
            if at != target + payload:
                data[target + payload : target + payload + size] = data[at : at + size]
            payload += size
            at += size
        elif kind == RLE and at < end and data[at] == uint8(0):
            zeros += size
            at += 1
        else:
            return -1
    return payload if at == end and payload + zeros == length else -1
