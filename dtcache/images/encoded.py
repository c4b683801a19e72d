"""Reading an encoded image; a file is refused if it is too large for the size in its header."""

import functools
import io
import os
from pathlib import Path

from PIL import Image

from dtcache.images.structure import TIFF, tiff_size
from dtcache.regular_files import open_handle

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow detects formats by content, not by file name.

Without this list it would also decode formats, such as EPS, by running other programs.
"""
MAX_FILE_BYTES = 1 << 30
"""Larger files fail: an image within the limit of pixels never needs as many bytes."""
SMALL_BYTES = 64 << 20
"""Files up to this size are read without a look at their header."""
HEAD_BYTES = 1 << 20
BYTES_PER_PIXEL = 16
"""Most bytes per pixel of a file, in addition to SMALL_BYTES: four channels of 32 bits."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the formats of FORMATS that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_image(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """Return `size` bytes of a file from `offset` on, by default all, that are an encoded image.

    Returns fewer bytes if the file ends earlier. Raises OSError if the path is not a regular file.
    Also raises it, before the bytes are read, if they are more than MAX_FILE_BYTES, or more than
    an image of the size in the header can need.
    """
    with open(open_handle(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        if size > MAX_FILE_BYTES:
            raise OSError(f"{size} bytes, over the limit of {MAX_FILE_BYTES}")
        if size > SMALL_BYTES:
            _require_plausible(file, offset, size)
        return os.pread(file.fileno(), size, offset)


def _require_plausible(file: io.FileIO, offset: int, size: int) -> None:
    """Raise OSError if the size in an image's header is too small for `size` bytes."""
    head = os.pread(file.fileno(), HEAD_BYTES, offset)
    try:
        if head[:4] in TIFF:  # the directory may lie anywhere
            width, height = tiff_size(lambda at, count: os.pread(file.fileno(), count, offset + at))
        else:
            with Image.open(io.BytesIO(head), formats=formats()) as opened:
                width, height = opened.size
    except Exception as error:  # damaged headers raise many types
        raise OSError(f"{size} bytes, and no image in the first {len(head)} of them") from error
    if size > BYTES_PER_PIXEL * width * height + SMALL_BYTES:
        raise OSError(f"{size} bytes, too many for {width}x{height} pixels")
