"""Damage of pixel data that decoders do not report.

A PNG decoder ignores the checksums of pixel data. A JPEG file has none, and its decoder fills
missing pixels with one colour. Missing pixel data and zeros in their place are recognised; a
changed byte of a JPEG cannot be.
"""

import zlib

from dtcache.images.structure import (
    END,
    JPEG,
    PNG,
    SCAN,
    Segment,
    is_intact,
    jpeg_scans,
    png_chunks,
)

INFLATED = 1 << 20
"""Bytes that are inflated at a time."""
TABLES = 0xC4
"""Marker of JPEG code tables."""
PROGRESSIVE = 0xC2
"""Marker of the frame of a progressive JPEG."""
BETWEEN_SCANS = frozenset({END, TABLES, SCAN, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE})
"""Markers that may follow the pixel data of a JPEG scan."""
ZEROS = 128
"""More zero bytes than JPEG pixels have, unless the shortest codes mean pixels of one colour."""
SURPLUS = bytes(range(16, 80))


def damage(data: bytes) -> str | None:
    """Return the damage of a file's pixel data, or None if none is recognised."""
    if data.startswith(PNG):
        return _png_damage(data)
    return _jpeg_damage(data) if data.startswith(JPEG) else None


def with_surplus(data: bytes) -> bytes | None:
    """Return a JPEG file with surplus data after the pixels of its last scan; None for other files.

    A decoder ignores the surplus if the pixels are complete. If they are not, it decodes the
    surplus to pixels.
    """
    ends = [end for _, end in jpeg_scans(data)] if data.startswith(JPEG) else []
    return data[: ends[-1]] + SURPLUS + data[ends[-1] :] if ends else None


def _png_damage(data: bytes) -> str | None:
    pixels = [chunk for chunk in png_chunks(data) if chunk[0] == b"IDAT"]
    if all(len(chunk[2]) < 4 or is_intact(*chunk) for chunk in pixels):
        return None
    # The pixels have a second checksum. It is right if only a chunk's checksum is wrong.
    inflate = zlib.decompressobj()
    try:
        for _, content, _ in pixels:
            left = content
            while left and not inflate.eof:
                inflate.decompress(left, INFLATED)
                left = inflate.unconsumed_tail
    except zlib.error:
        pass
    return None if inflate.eof else "its pixel data do not have their checksum"


def _jpeg_damage(data: bytes) -> str | None:
    content = data.rstrip(b"\0")
    zeros = len(data) - len(content)
    if zeros >= ZEROS and content[-2:] != bytes((0xFF, END)):
        return f"its last {zeros} bytes are zeros, without an end of the image"
    frames = _Frames()
    for segments, end in jpeg_scans(data):
        for segment in segments:
            frames.add(segment)
        if end < len(data) and data[end + 1] not in BETWEEN_SCANS:
            return f"an unknown marker, {data[end : end + 2].hex()}, among its pixels"
        if frames.has_no_zeros and data.find(bytes(ZEROS), segments[-1].stop, end) >= 0:
            return "a part of its pixel data was replaced by zeros"
    return "the last scans of its pixels are missing" if frames.is_unfinished else None


class _Frames:
    """What the segments of a JPEG file say of its scans."""

    def __init__(self) -> None:
        self._is_progressive = False
        self._zeros_end_block: dict[int, bool] = {}
        """By number of the AC table: whether the code of only zeros ends a block."""
        self._zeros_are_flat = True
        """Whether zeros in the last scan are blocks of one colour."""
        self._missing_bits: dict[int, list[int]] = {}
        """Lower bits of each coefficient that no scan had yet, by component."""

    def add(self, segment: Segment) -> None:
        """Read a segment."""
        content = segment.content
        if segment.marker == PROGRESSIVE:
            self._is_progressive = True
            self._missing_bits = {content[i]: [16] * 64 for i in range(6, len(content) - 2, 3)}
        elif segment.marker == TABLES:
            self._read_tables(content)
        elif segment.marker == SCAN:
            count = content[0]
            tables = [byte & 15 for byte in content[2 : 2 + 2 * count : 2]]
            self._zeros_are_flat = all(self._zeros_end_block.get(table, True) for table in tables)
            first, last, bits = content[1 + 2 * count : 4 + 2 * count]
            for component in content[1 : 1 + 2 * count : 2] if self._is_progressive else ():
                self._missing_bits[component][first : last + 1] = [bits & 15] * (last - first + 1)

    @property
    def has_no_zeros(self) -> bool:
        """Whether long runs of zeros cannot be pixels."""
        return not self._is_progressive and not self._zeros_are_flat

    @property
    def is_unfinished(self) -> bool:
        """Whether a progressive image lacks bits of a coefficient."""
        return any(any(bits) for bits in self._missing_bits.values())

    def _read_tables(self, content: bytes) -> None:
        start = 0
        while start + 17 < len(content):
            if content[start] >> 4:  # of AC coefficients
                self._zeros_end_block[content[start] & 15] = content[start + 17] == 0
            start += 17 + sum(content[start + 1 : start + 17])
