"""From encoded bytes to the view's pixels: decoding, resizing, and loading many with threads."""

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
"""Larger images are failures: the limit at which Pillow, too, begins to suspect a decompression
bomb.
"""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow goes by content, not by name, and knows formats that it decodes by running another
program, such as EPS.
"""
LOOKAHEAD = 256
"""Views that may wait decoded, so that memory is flat however far a consumer falls behind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedView:
    """One image as the view shows it, or the reason why there is none."""

    index: int
    """Place in the source's order."""
    pixels_CHW: NDArray[np.uint8] | None
    """uint8 RGB, or None where the image failed."""
    source: bytes
    """The encoded bytes as the source holds them."""
    unchanged: bool
    """Whether decoding `source` gives exactly `pixels_CHW`, so that it can be stored as it is."""
    failure: str | None
    """Why the image could not be used."""


def decode_view(
    data: bytes, view: ViewSpec, *, stored: bool = False
) -> tuple[NDArray[np.uint8], bool]:
    """Decode an image, its first frame upright and on white, and bring it to the view's geometry.

    `stored` bytes come out of a cache: an older dtcache has put images there that it took without
    regard to their transparency or range, and its features are of those pixels.

    Returns uint8 RGB pixels (3, height, width) and whether the view changed no pixel of the decoded
    image. Raises BadImageError with the reason where the bytes are no image that can be decoded
    safely.
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
    except (
        Exception
    ) as error:  # damaged files raise nearly anything: struct.error, TypeError, AttributeError, ...
        reason = str(error).replace(" <_io.BytesIO object at", "").split(" 0x")[0]
        raise BadImageError(reason or type(error).__name__) from error
    unchanged = opaque is upright and image.size == (view.width, view.height)
    if image.size != (view.width, view.height):
        image = resize_to_view(image, view, Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)), unchanged


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the formats that are decoded, of those that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _in_range(image: Image.Image) -> Image.Image:
    """Return an image whose values have a known range. Raises BadImageError.

    Floats and 32-bit integers name none. Pillow takes them for 0 to 255 and clips the rest: to
    white, or to black.
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
    """Return the image itself where it is opaque, else what it shows on white: colours under an
    alpha are arbitrary.
    """
    if not image.has_transparency_data or image.mode.startswith("I;16"):
        return image
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return image
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)


def _rgb(image: Image.Image) -> Image.Image:
    """Return 8-bit RGB; 16-bit greyscale is scaled down, where Pillow's own conversion would clip
    it to white.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def resize_to_view(image: Image.Image, view: ViewSpec, resampling: Image.Resampling) -> Image.Image:
    """Resize an upright image to the view, by an antialiased filter or NEAREST; crop its centre
    where the view does.
    """
    size = (view.width, view.height)
    if view.fit == "stretch":
        return image.resize(size, resampling)
    return ImageOps.fit(image, size, resampling, centering=(0.5, 0.5))


def upright_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) of an encoded image that `decode_view` decodes, upright, from its
    header alone.
    """
    with Image.open(io.BytesIO(data), formats=_formats()) as opened:
        lies = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (opened.width, opened.height) if lies else (opened.height, opened.width)


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
