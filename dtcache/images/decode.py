"""From encoded bytes to the pixels of a view: decoded, upright, opaque, resized."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from dtcache.errors import BadImageError
from dtcache.images.damage import damage, with_surplus
from dtcache.images.encoded import formats
from dtcache.images.structure import exif_orientation, pixels_only
from dtcache.recipe import ViewSpec

T = TypeVar("T")

MAX_PIXELS = 89_478_485
"""Larger images fail; from this size, Pillow warns of a decompression bomb."""
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""


def decode_view(
    data: bytes, view: ViewSpec, *, stored: bool = False
) -> tuple[NDArray[np.uint8], bool]:
    """Decode the first frame of an image, upright and on white, and resize it to the view.

    Set `stored` for bytes from a cache. Older versions of dtcache stored images whose transparency
    or value range they ignored, and the features belong to the pixels decoded in that way.

    Returns uint8 RGB pixels (3, height, width), and whether they equal the decoded image's pixels.
    Raises BadImageError if the bytes cannot be decoded safely.
    """
    decoded = decode_fully(data, view, stored=stored)
    return decoded.pixels_CHW, decoded.unchanged


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedView:
    """A view's pixels."""

    pixels_CHW: NDArray[np.uint8]
    unchanged: bool
    """Whether the view has exactly the decoded image's pixels."""
    emptiness: str | None
    """Why the image surely shows nothing, or None."""


def decode_fully(data: bytes, view: ViewSpec, *, stored: bool) -> DecodedView:
    """Decode as `decode_view` does, and look for emptiness too. Raises BadImageError."""
    if not data:
        raise BadImageError("empty file")
    try:
        opened = open_pixels(data, formats(), _of_view(view) if stored else _upright)
        upright = opened.image
        if not stored and (reason := damage(data) or _shortage(data, opened)) is not None:
            raise BadImageError(reason)
        opaque = upright if stored else _on_white(_in_range(upright))
        image = _rgb(opaque)
    except BadImageError:
        raise
    except Exception as error:  # damaged files raise many types, such as struct.error or TypeError
        raise BadImageError(decoding_failure(error)) from error
    unchanged = opaque is upright and image.size == (view.width, view.height)
    if image.size != (view.width, view.height):
        image = resize_to_view(image, view, Image.Resampling.BICUBIC)
    pixels_CHW = np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
    return DecodedView(
        pixels_CHW=pixels_CHW,
        unchanged=unchanged,
        emptiness=_emptiness(pixels_CHW, opaque, opened.is_deep),
    )


def open_pixels(data: bytes, allowed: tuple[str, ...], read: Callable[[Image.Image], T]) -> T:
    """Return `read` of the opened image of an allowed format; malformed metadata is ignored.

    If opening or reading fails, it is tried again without the file's metadata, except the
    orientation. Raises what Pillow raises for pixels that cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=allowed) as opened:
            return read(opened)
    except BadImageError:
        raise
    except Exception:
        bare = pixels_only(data)
        if bare is None:
            raise
    with Image.open(io.BytesIO(bare.data), formats=allowed) as opened:
        if bare.exif is not None:
            opened.info["exif"] = bare.exif
        return read(opened)


def decoding_failure(error: Exception) -> str:
    """Return why Pillow could not decode an image, without an address in memory."""
    reason = str(error).replace(" <_io.BytesIO object at", "").split(" 0x")[0]
    return reason or type(error).__name__


@dataclass(frozen=True, kw_only=True, slots=True)
class _Upright:
    """The first frame of a file."""

    image: Image.Image
    """The upright image."""
    is_deep: bool
    """Whether the file has 16 bits per channel."""
    ends_flat: bool
    """Whether the file is a JPEG whose last 8x8 pixels have one colour."""


def _upright(opened: Image.Image) -> _Upright:
    """Load the first frame and make it upright. Raises BadImageError if it is too large."""
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{width}x{height} pixels, over the limit of {MAX_PIXELS}")
    tiles = getattr(opened, "tile", [])  # loading clears them
    is_deep = opened.mode.startswith("I;16") or any(";16" in str(tile) for tile in tiles)
    opened.load()
    last = opened.crop((max(0, width - 8), max(0, height - 8), width, height))
    is_jpeg = opened.format in ("JPEG", "MPO")
    transpose = TRANSPOSES.get(_orientation(opened))
    return _Upright(
        image=opened.copy() if transpose is None else opened.transpose(transpose),
        is_deep=is_deep,
        ends_flat=is_jpeg and last.getcolors(1) is not None,
    )


def _of_view(view: ViewSpec) -> Callable[[Image.Image], _Upright]:
    """Return a reader of images that have the view's size, or else are refused undecoded."""

    def read(opened: Image.Image) -> _Upright:
        if sorted(opened.size) != sorted((view.width, view.height)):
            width, height = opened.size
            raise BadImageError(
                f"a stored image has {height}x{width} pixels, not the view's size, "
                f"{view.height}x{view.width}"
            )
        return _upright(opened)

    return read


def _shortage(data: bytes, opened: _Upright) -> str | None:
    """Return that a JPEG file has too few pixel data, or None.

    The decoder fills missing blocks of 8x8 pixels with one colour. Thus only a file whose last
    pixels have one colour is decoded a second time, with surplus data.
    """
    surplus = with_surplus(data) if opened.ends_flat else None
    if surplus is None:
        return None
    is_complete = open_pixels(surplus, formats(), _upright).image == opened.image
    return None if is_complete else "its pixel data end too early"


def _orientation(opened: Image.Image) -> int:
    """Return an image's orientation by EXIF or else XMP; 1 if it has none that can be read."""
    exif = opened.info.get("exif")
    orientation = exif_orientation(exif) if isinstance(exif, bytes) else None
    if orientation is not None:
        return orientation
    try:
        value = opened.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value)
    except Exception:  # malformed EXIF data raise many types
        return 1


def _emptiness(pixels_CHW: NDArray[np.uint8], image: Image.Image, is_deep: bool) -> str | None:
    """Return why an image surely shows nothing, or None.

    16-bit files with values of 12 bits decode to almost black: only the upper 8 bits are used.
    """
    if (pixels_CHW == pixels_CHW[:, :1, :1]).all():
        colour = set(pixels_CHW[:, 0, 0].tolist())
        return {(0,): "all black", (255,): "all white"}.get(tuple(colour), "all of one colour")
    if is_deep:
        limit = 4095 if image.mode.startswith("I;16") else 15
        if np.asarray(image).max() <= limit:
            return "12 bits in a 16-bit file"
    return None


def _in_range(image: Image.Image) -> Image.Image:
    """Return the image if its values are in a known range. Raises BadImageError if they are not.

    Pillow shows a palette index that has no colour as black. Floats and 32-bit integers have no
    defined range. Pillow takes them for 0 to 255 and clips other values to black or white.
    """
    if image.mode == "P":
        colours = len(image.getpalette() or ()) // 3
        highest = int(np.asarray(image).max())
        if highest >= colours:
            raise BadImageError(f"palette index {highest}, but its palette has {colours} colours")
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
    if view.resize_mode == "stretch":
        return image.resize(size, resampling)
    return ImageOps.fit(image, size, resampling, centering=(0.5, 0.5))


def upright_size(data: bytes) -> tuple[int, int]:
    """Return the (height, width) of an encoded image after rotation, from its header alone."""

    def size(opened: Image.Image) -> tuple[int, int]:
        tags = getattr(opened, "tag_v2", {})  # some versions of Pillow rotate the size of a TIFF
        width = tags.get(ExifTags.Base.ImageWidth, opened.width)
        height = tags.get(ExifTags.Base.ImageLength, opened.height)
        return (width, height) if _orientation(opened) in (5, 6, 7, 8) else (height, width)

    return open_pixels(data, formats(), size)
