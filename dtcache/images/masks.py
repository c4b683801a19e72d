"""Segmentation masks: PNG files of class numbers, found by key and resized to the view."""

import tomllib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dtcache.errors import BadImageError, ImagesError, ImagesNotFoundError
from dtcache.images.damage import damage
from dtcache.images.decode import MAX_PIXELS, decoding_failure, open_pixels, resize_to_view
from dtcache.images.encoded import read_image
from dtcache.images.folder import is_image
from dtcache.names import is_fit
from dtcache.recipe import ViewSpec

CLASSES_FILE = "classes.toml"
MAX_CLASSES_BYTES = 1 << 20
IGNORE = 255
HINTED = 100
"""Most keys without a mask that are looked up in another Unicode form."""
MODES = ("1", "L", "P", "I", "I;16")
STRETCHED = {"L;2": 85, "L;4": 17}
"""Pillow scales greyscale of 2 and 4 bits to 0..255; dividing by these factors undoes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskFolder:
    """A folder of masks; safe to share between threads."""

    root: Path
    ignore: int
    """The ignore index: pixels of this value belong to no class, even if it is a class's number."""
    names: tuple[str, ...] | None
    """Class names by number; None if the folder names no classes."""

    def path(self, key: str) -> Path:
        """Return the path of an image's mask: the image's path with .png as its extension."""
        return self.root / f"{key.rpartition('.')[0] if is_image(key) else key}.png"

    def has(self, key: str) -> bool:
        """Return whether an image has a mask; a key that leads out of the folder has none."""
        parts = PurePosixPath(key)
        return not parts.is_absolute() and ".." not in parts.parts and self.path(key).is_file()

    def form_hint(self, keys: Iterable[str]) -> str:
        """Return a hint if masks of some of the keys exist under another Unicode form, else ""."""
        for key in islice(keys, HINTED):
            for form in ("NFC", "NFD"):
                other = unicodedata.normalize(form, key)
                if other != key and self.has(other):
                    return (
                        f" (the mask of {key} has the Unicode form {form}, its image another one; "
                        "rename the masks)"
                    )
        return ""

    def require_several(self, values: Sequence[int]) -> None:
        """Raise ImagesError if masks contain fewer than two classes: a model would learn nothing.

        `values` are the class numbers that occur, without the ignore index.
        """
        if len(values) < 2:
            occurring = f"only {values[0]}" if len(values) else "none"
            raise ImagesError(
                f"{self.root}: expected masks of at least two classes, got {occurring} "
                f"({self.ignore} is ignored); number the classes 0, 1, ..., or pass a different "
                "`ignore_index`"
            )

    def load(
        self, key: str, view: ViewSpec, image_size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        """Return an image's mask in the view's geometry: class numbers and `ignore`, uint8 (H, W).

        Resizing takes nearest pixels. `image_size` is the upright image's (height, width), which
        the mask must have; None skips this check. Raises ImagesError if the mask cannot be read,
        has another size, or has a value that is not a class.
        """
        path = self.path(key)
        if not self.has(key):
            raise ImagesError(f"{path}: expected the mask of image {key}, got no such file; add it")
        mask = _decode(path)
        if image_size is not None and mask.shape != image_size:
            raise ImagesError(
                f"{path}: expected the size of image {key}, {image_size[1]}x{image_size[0]} "
                f"pixels, got {mask.shape[1]}x{mask.shape[0]}; draw masks on the upright images"
            )
        if self.names is not None:
            odd = mask[(mask >= len(self.names)) & (mask != self.ignore)]
            if odd.size:
                raise ImagesError(
                    f"{path}: expected the values 0 to {len(self.names) - 1} of the classes in "
                    f"{self.root / CLASSES_FILE} ({', '.join(self.names)[:200]}) or {self.ignore}, "
                    f"which is ignored, got {odd[0]}; name its class, or pass it as `ignore_index`"
                )
        if mask.shape == (view.height, view.width):
            return mask
        return np.asarray(resize_to_view(Image.fromarray(mask), view, Image.Resampling.NEAREST))


def open_masks(root: Path, ignore: int | None = None) -> MaskFolder:
    """Open a folder of masks, with `names` and `ignore` of its classes.toml, if it has one.

    The argument `ignore` takes precedence over the file; without either, the ignore index is 255.
    Raises ImagesNotFoundError if there is no folder, and ImagesError if classes.toml is invalid or
    the ignore index is not a value of a mask.
    """
    if not root.is_dir():
        raise ImagesNotFoundError(
            f"{root}: expected a folder of masks (PNG), got none; pass the folder that holds them"
        )
    path = root / CLASSES_FILE
    classes = _read_classes(path) if path.is_file() else {}
    names = classes.get("names")
    value = classes.get("ignore", IGNORE) if ignore is None else ignore
    origin = path if ignore is None else root
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255:
        raise ImagesError(
            f"{origin}: expected an ignore index from 0 to 255, got {str(value)[:40]!r}"
        )
    if names is not None:
        good = isinstance(names, list) and all(
            isinstance(n, str) and n and is_fit(n) for n in names
        )
        if not good or not 1 <= len(names) <= 256 or len(set(names)) < len(names):
            raise ImagesError(
                f"{path}: expected names = [...], 1 to 256 distinct class names by number, got "
                f"{str(names)[:80]}"
            )
    return MaskFolder(root=root, ignore=value, names=tuple(names) if names is not None else None)


def _read_classes(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CLASSES_BYTES:
            raise ImagesError(
                f"{path}: expected at most {MAX_CLASSES_BYTES} bytes, got {path.stat().st_size}"
            )
        classes = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ImagesError(
            f"{path}: cannot be read ({error.strerror or error}); make it readable"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImagesError(
            f"{path}: not TOML ({error}); expected names = [...] and, if needed, ignore = N"
        ) from error
    if odd := sorted(classes.keys() - {"names", "ignore"}):
        raise ImagesError(f"{path}: expected names and ignore, got {odd[0][:40]!r}; leave it out")
    return classes


def _decode(path: Path) -> NDArray[np.uint8]:
    """Return the values (H, W) of a PNG file without conversion. Raises ImagesError."""

    def read(opened: Image.Image) -> tuple[str, tuple[int, int], str, NDArray[Any] | None]:
        tile = getattr(opened, "tile", [])
        stored = str(tile[0][3]) if tile else opened.mode
        is_small = opened.width * opened.height <= MAX_PIXELS
        values = np.asarray(opened) if opened.mode in MODES and is_small else None
        return opened.mode, opened.size, stored, values

    try:
        data = read_image(path)
        mode, size, stored, values = open_pixels(data, ("PNG",), read)
        if (problem := damage(data)) is not None:
            raise BadImageError(problem)
    except Exception as error:  # damaged files raise many types, such as SyntaxError
        strerror = error.strerror if isinstance(error, OSError) else None
        raise ImagesError(
            f"{path}: not a readable mask ({strerror or decoding_failure(error)}); write it again "
            "as PNG"
        ) from error
    if size[0] * size[1] > MAX_PIXELS:
        raise ImagesError(
            f"{path}: {size[0]}x{size[1]} pixels, over the limit of {MAX_PIXELS}; make it smaller"
        )
    if values is None:
        raise ImagesError(
            f"{path}: expected a mask of one channel, class numbers as grey values or palette "
            f"indices, got {mode} pixels; convert colours to class numbers"
        )
    if values.max(initial=0) > 255:
        raise ImagesError(
            f"{path}: expected class numbers from 0 to 255, got {values.max()}; renumber the "
            "classes"
        )
    return (values.astype(np.uint8) // STRETCHED.get(stored, 1)).astype(np.uint8)
