"""From encoded bytes to the view's pixels: decoding, resizing, and loading many with threads."""

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dtcache.errors import BadImageError
from dtcache.images.source import ImageSource
from dtcache.spec import ViewSpec

MAX_PIXELS = 89_478_485
"""Larger images are failures: the limit at which Pillow, too, begins to suspect a decompression bomb."""
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


def decode_view(data: bytes, view: ViewSpec) -> tuple[NDArray[np.uint8], bool]:
    """Decode an image and bring it to the view's geometry.

    Returns uint8 RGB pixels (3, height, width) and whether the view changed no pixel of the decoded image.
    Raises BadImageError with the reason where the bytes are no image that can be decoded safely.
    """
    if not data:
        raise BadImageError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise BadImageError(f"{opened.width}x{opened.height} pixels, over the limit of {MAX_PIXELS}")
            image = _rgb(ImageOps.exif_transpose(opened))
    except BadImageError:
        raise
    except Exception as error:  # damaged files raise nearly anything: struct.error, TypeError, AttributeError, ...
        reason = str(error).replace(" <_io.BytesIO object at", "").split(" 0x")[0]
        raise BadImageError(reason or type(error).__name__) from error
    unchanged = image.size == (view.width, view.height)
    if not unchanged:
        image = _resize(image, view)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)), unchanged


def _rgb(image: Image.Image) -> Image.Image:
    """Return 8-bit RGB; 16-bit greyscale is scaled down, where Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _resize(image: Image.Image, view: ViewSpec) -> Image.Image:
    """Resize with Pillow's antialiased bicubic filter; crop the centre where the view asks for it."""
    size = (view.width, view.height)
    if view.fit == "stretch":
        return image.resize(size, Image.Resampling.BICUBIC)
    return ImageOps.fit(image, size, Image.Resampling.BICUBIC, centering=(0.5, 0.5))


def load_views(source: ImageSource, indices: Iterable[int], view: ViewSpec, *, threads: int) -> Iterator[LoadedView]:
    """Load views in the order of `indices`, decoding ahead in threads (Pillow releases the GIL)."""

    def load(index: int) -> LoadedView:
        data = b""
        try:
            data = source.read(index)
            pixels_CHW, unchanged = decode_view(data, view)
        except (OSError, BadImageError) as error:
            reason = str(error) if isinstance(error, BadImageError) else f"unreadable: {error.strerror or error}"
            return LoadedView(index=index, pixels_CHW=None, source=b"", unchanged=False, failure=reason)
        return LoadedView(index=index, pixels_CHW=pixels_CHW, source=data, unchanged=unchanged, failure=None)

    todo = iter(indices)
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode") as pool:
        waiting: deque[Future[LoadedView]] = deque(pool.submit(load, i) for i in islice(todo, LOOKAHEAD))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(load, i) for i in islice(todo, 1))
        finally:
            for future in waiting:
                future.cancel()
