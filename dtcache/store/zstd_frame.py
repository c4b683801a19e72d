"""Zstandard frames (RFC 8878) built by hand: the payload as Raw blocks, its padding as RLE blocks.

Entropy-coded payloads and compressed images do not compress further, so zstd would only remove the
padding. These frames do that in as few bytes, every zstd decoder reads them, and the read kernel
finds the payload with a few comparisons.
"""

from numcodecs.zstd import compress

ZSTD_LEVEL = 1
MAGIC = b"\x28\xb5\x2f\xfd"
MAX_BLOCK = 1 << 17
"""Maximum bytes of a block, stored and decompressed (RFC 8878)."""
RAW = 0
RLE = 1
BLOCK_HEADER = 3
WORTH = 15 / 16
"""zstd's own frame is used if it is smaller than this fraction of ours: it is slower to read."""


def pack_frame(payload: bytes, length: int) -> bytes:
    """Return a frame that decompresses to `payload`, padded with zeros to `length` bytes.

    `length` is over 0 and under 2^32.
    """
    blocks = [(RAW, payload[at : at + MAX_BLOCK]) for at in range(0, len(payload), MAX_BLOCK)]
    zeros = length - len(payload)
    blocks += [(RLE, b"\0" * min(MAX_BLOCK, zeros - at)) for at in range(0, zeros, MAX_BLOCK)]
    parts = [frame_header(length)]
    for number, (kind, content) in enumerate(blocks):
        last = number == len(blocks) - 1
        parts.append((last | kind << 1 | len(content) << 3).to_bytes(BLOCK_HEADER, "little"))
        parts.append(content if kind == RAW else content[:1])
    plain = b"".join(parts)
    packed: bytes = compress(payload.ljust(length, b"\0"), ZSTD_LEVEL)
    return packed if len(packed) < WORTH * len(plain) else plain


def frame_header(length: int) -> bytes:
    """Return the header of our frames: single segment, content size, no checksum, no dictionary."""
    if length < 256:
        return MAGIC + b"\x20" + length.to_bytes(1, "little")
    if length < 256 + (1 << 16):
        return MAGIC + b"\x60" + (length - 256).to_bytes(2, "little")
    return MAGIC + b"\xa0" + length.to_bytes(4, "little")
