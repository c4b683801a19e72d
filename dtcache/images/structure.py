"""The structure of image files: what their pixels need, and the orientation.

A decoder reads a file's metadata (EXIF, colour profile, texts) before its pixels, and fails if the
metadata are malformed. `pixels_only` leaves them out.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
TIFF = {b"II*\0": "<", b"MM\0*": ">"}
"""Byte order by the first bytes of a TIFF file, which EXIF data are too."""
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
JPEG_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
"""Markers of segments without pixels: APP1 to APP13, APP15 and comments."""
COLOUR_CODING = {0xE0: 14, 0xEE: 12}
"""Least bytes of the segments that say how colours are coded, by marker: JFIF and Adobe."""
TIFF_PIXELS = frozenset(
    {254, *range(256, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320}
    | {*range(322, 326), 332, 338, 339, 347, *range(512, 522), 529, 530, 532}
)
"""Tags that describe the pixels of a TIFF file: layout, compression, colours, orientation."""
IMAGE_WIDTH = 256
IMAGE_LENGTH = 257
ORIENTATION = 0x0112
SHORT = 3
LONG = 4
SCAN = 0xDA
"""Marker of a scan's header."""
END = 0xD9
"""Marker of the end of a JPEG image."""
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker in JPEG pixel data, apart from restart markers, which belong there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A segment of a JPEG file."""

    marker: int
    """The marker's second byte; the first one is 0xff."""
    start: int
    """Position of the marker."""
    stop: int
    content: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelsOnly:
    """An image file without its metadata."""

    data: bytes
    exif: bytes | None
    """The EXIF data that were left out, if there are any."""


def pixels_only(data: bytes) -> PixelsOnly | None:
    """Return a file without its metadata; None if its format or structure is not known here.

    Pixels, palette, transparency and colour coding stay as they are.
    """
    try:
        if data.startswith(PNG):
            return _png_pixels(data)
        if data.startswith(JPEG):
            return _jpeg_pixels(data)
        if data[:4] in TIFF:
            return PixelsOnly(data=_tiff_pixels(data), exif=None)
    except (struct.error, IndexError):  # the structure itself is damaged
        return None
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        # An item of an unknown type is skipped; "infe" is the box of an item's type.
        hidden = re.sub(rb"(infe.{8}(?:..)?)Exif", rb"\1free", data, flags=re.DOTALL)
        return PixelsOnly(data=hidden, exif=None)
    return None


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation, an integer, in EXIF data; None if there is none that can be read.

    Only the entries of the first directory are read, up to the first one that is cut off.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = TIFF.get(exif[:4])
    if order is None:
        return None
    orientation = None
    try:
        for _, tag, kind, count, value in _directory(exif, order):
            if tag == ORIENTATION and count == 1 and kind in (SHORT, LONG):
                orientation = struct.unpack(order + ("H2x" if kind == SHORT else "I"), value)[0]
    except struct.error:
        pass
    return orientation


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield name, content and checksum of each PNG chunk up to the end of the image.

    The content or the checksum of the last chunk is short if the file is cut off.
    """
    start = len(PNG)
    name = b""
    while name != b"IEND" and start + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        stop = start + 8 + length
        yield name, data[start + 8 : stop], data[stop : stop + 4]
        start = stop + 4


def _png_pixels(data: bytes) -> PixelsOnly:
    kept = [PNG]
    exif = None
    for name, content, checksum in png_chunks(data):
        if name in PNG_PIXELS:
            kept.append(struct.pack(">I", len(content)) + name + content + checksum)
        elif name == b"eXIf" and is_intact(name, content, checksum):
            exif = content
    kept.append(struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND")))
    return PixelsOnly(data=b"".join(kept), exif=exif)


def is_intact(name: bytes, content: bytes, checksum: bytes) -> bool:
    """Return whether a PNG chunk has its checksum."""
    return zlib.crc32(content, zlib.crc32(name)).to_bytes(4, "big") == checksum


def jpeg_scans(data: bytes) -> Iterator[tuple[list[Segment], int]]:
    """Yield each scan of a JPEG file: the segments before its pixels, and where its pixels end.

    The last segment is the scan's header, which its pixels follow.
    """
    position = 2
    while True:
        segments = list(_segments(data, position))
        if not segments or segments[-1].marker != SCAN:
            return
        end = MARKER.search(data, segments[-1].stop)
        position = end.start() if end is not None else len(data)
        yield segments, position


def _segments(data: bytes, start: int) -> Iterator[Segment]:
    """Yield JPEG segments up to the next scan's header, the image's end, or bytes of no segment."""
    marker = 0
    while marker != SCAN and start + 4 <= len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if marker == 0xFF:  # a fill byte
            start += 1
            continue
        if marker == END:
            return
        stop = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        yield Segment(marker=marker, start=start, stop=stop, content=data[start + 4 : stop])
        start = stop


def _jpeg_pixels(data: bytes) -> PixelsOnly | None:
    kept = [data[:2]]
    exif = b""
    for segment in _segments(data, 2):
        if segment.marker == SCAN:
            kept.append(data[segment.start :])
            return PixelsOnly(data=b"".join(kept), exif=exif or None)
        is_short = len(segment.content) < COLOUR_CODING.get(segment.marker, 0)
        if segment.marker not in JPEG_METADATA and not is_short:
            kept.append(data[segment.start : segment.stop])
        elif segment.marker == 0xE1 and segment.content.startswith(b"Exif\0\0"):
            exif += segment.content[6 if exif else 0 :]
    return None


def _directory(data: bytes, order: str) -> Iterator[tuple[int, int, int, int, bytes]]:
    """Yield position, tag, type, count and value field of each entry of the first directory."""
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        yield entry, *struct.unpack_from(order + "HHI4s", data, entry)


def tiff_size(read: Callable[[int, int], bytes]) -> tuple[int, int]:
    """Return the (width, height) of a TIFF file; `read` returns a number of bytes at a position.

    Raises struct.error if its first directory is cut off, and KeyError if it states no size.
    """
    head = read(0, 8)
    order = TIFF[head[:4]]
    (start,) = struct.unpack_from(order + "I", head, 4)
    (count,) = struct.unpack(order + "H", read(start, 2))
    entries = read(start + 2, 12 * count)
    sizes = {}
    for at in range(0, 12 * count, 12):
        tag, kind = struct.unpack_from(order + "HH", entries, at)
        if tag in (IMAGE_WIDTH, IMAGE_LENGTH):
            (sizes[tag],) = struct.unpack_from(
                order + ("H" if kind == SHORT else "I"), entries, at + 8
            )
    return sizes[IMAGE_WIDTH], sizes[IMAGE_LENGTH]


def _tiff_pixels(data: bytes) -> bytes:
    """Return a TIFF file whose first directory, the only one, lists the tags of TIFF_PIXELS."""
    order = TIFF[data[:4]]
    entries = [
        data[position : position + 12]
        for position, tag, *_ in _directory(data, order)
        if tag in TIFF_PIXELS
    ]
    (start,) = struct.unpack_from(order + "I", data, 4)
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]
