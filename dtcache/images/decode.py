"""From encoded bytes to a view's pixels: decoding, resizing, and loading many images in threads."""

import functools
import io
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from dtcache.errors import BadImageError
from dtcache.images.source import ImageSource
from dtcache.recipe import ViewSpec

MAX_PIXELS = 89_478_485
"""Larger images fail; from this size, Pillow warns of a decompression bomb."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow detects formats by content, not by file name.

Without this list it would also decode formats, such as EPS, by running other programs.
"""
LOOKAHEAD = 256
"""Views that may be decoded ahead, which bounds memory if the consumer is slow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedView:
    """One image in the view's geometry, or the reason why it failed."""

    index: int
    """Index in the source."""
    pixels_CHW: NDArray[np.uint8] | None
    """uint8 RGB; None if the image failed."""
    source: bytes
    """The encoded bytes from the source."""
    unchanged: bool
    """Whether `source` decodes to exactly `pixels_CHW`, so that a cache can store it unchanged."""
    failure: str | None
    """Why the image cannot be used; None if it can."""


def decode_view(
    data: bytes, view: ViewSpec, *, stored: bool = False
) -> tuple[NDArray[np.uint8], bool]:
    """Decode the first frame of an image, upright and on white, and resize it to the view.

    Set `stored` for bytes from a cache. Older versions of dtcache stored images whose transparency
    or value range they ignored, and the features belong to the pixels decoded in that way.

    Returns uint8 RGB pixels (3, height, width), and whether they equal the decoded image's pixels.
    Raises BadImageError if the bytes cannot be decoded safely.
    """
    if not data:
        raise BadImageError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise BadImageError(
                    f"{opened.width}x{opened.height} pixels, over the limit of {MAX_PIXELS}"
                )
            upright = ImageOps.exif_transpose(opened)
        opaque = upright if stored else _on_white(_in_range(upright))
        image = _rgb(opaque)
    except BadImageError:
        raise
    except Exception as error:  # damaged files raise many types, such as struct.error or TypeError
        reason = str(error).replace(" <_io.BytesIO object at", "").split(" 0x")[0]
        raise BadImageError(reason or type(error).__name__) from error
    unchanged = opaque is upright and image.size == (view.width, view.height)
    if image.size != (view.width, view.height):
        image = resize_to_view(image, view, Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)), unchanged


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the formats of FORMATS that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _in_range(image: Image.Image) -> Image.Image:
    """Return the image if the range of its values is known. Raises BadImageError if it is not.

    Floats and 32-bit integers have no defined range. Pillow takes them for 0 to 255 and clips other
    values to black or white.
    """
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low = values.min()
        high = values.max()
        if not (low >= 0 and high <= 255) or (image.mode == "F" and 0 < high <= 1):
            kind = "floating-point" if image.mode == "F" else "32-bit"
            raise BadImageError(
                f"{kind} pixels from {low:g} to {high:g}, expected 0 to 255: convert it to 8 or 16 "
                "bits"
            )
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image itself if it is opaque, else the image composited on white.

    The colours of transparent pixels are arbitrary.
    """
    if not image.has_transparency_data or image.mode.startswith("I;16"):
        return image
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return image
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)


def _rgb(image: Image.Image) -> Image.Image:
    """Return 8-bit RGB, with 16-bit greyscale scaled down.

    Pillow's own conversion would clip 16-bit values to white.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def resize_to_view(image: Image.Image, view: ViewSpec, resampling: Image.Resampling) -> Image.Image:
    """Resize an upright image to the view's size, by an antialiasing filter or NEAREST.

    The view's `fit` says whether the centre is cropped or the image is stretched.
    """
    size = (view.width, view.height)
    if view.fit == "stretch":
        return image.resize(size, resampling)
    return ImageOps.fit(image, size, resampling, centering=(0.5, 0.5))


def upright_size(data: bytes) -> tuple[int, int]:
    """Return the (height, width) of an encoded image after rotation, from its header alone."""
    with Image.open(io.BytesIO(data), formats=_formats()) as opened:
        is_rotated = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (opened.width, opened.height) if is_rotated else (opened.height, opened.width)


def load_views(
    source: ImageSource, indices: Iterable[int], view: ViewSpec, *, threads: int
) -> Generator[LoadedView, None, None]:
    """Load views in the order of `indices`, decoding ahead in threads (Pillow releases the GIL)."""

    def load(index: int, fetch: Callable[[], bytes]) -> LoadedView:
        try:
            data = fetch()
            pixels_CHW, unchanged = decode_view(data, view)
        except (OSError, BadImageError) as error:
            reason = (
                str(error)
                if isinstance(error, BadImageError)
                else f"unreadable: {error.strerror or error}"
            )
            return LoadedView(
                index=index, pixels_CHW=None, source=b"", unchanged=False, failure=reason
            )
        return LoadedView(
            index=index, pixels_CHW=pixels_CHW, source=data, unchanged=unchanged, failure=None
        )

    todo = source.fetches(indices)
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode") as pool:
        waiting: deque[Future[LoadedView]] = deque(
            pool.submit(load, *one) for one in islice(todo, LOOKAHEAD)
        )
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(load, *one) for one in islice(todo, 1))
        finally:
            for future in waiting:
                future.cancel()
