"""Images of a cache that stores none: read from the source and checked against recorded hashes."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dtcache.errors import BadImageError, ImagesError
from dtcache.images.decode import decode_view, upright_size
from dtcache.images.source import open_source
from dtcache.names import differ_in_form, normal_form
from dtcache.options.images import ImagesOptions
from dtcache.recipe import ViewSpec
from dtcache.samples import Column


class LinkedImages:
    """Views by row, from the images that a cache was extracted from; thread-safe."""

    def __init__(
        self,
        images: Path,
        keys: pa.ChunkedArray,
        content_sha256: pa.ChunkedArray,
        view: ViewSpec,
        reading: ImagesOptions | None = None,
    ) -> None:
        """Find each row's image in a source, opened as `reading` says, by key.

        Rows without a hash failed in the extraction and are not looked up. Raises ImagesError
        naming the first missing key.
        """
        self._images = images
        self._view = view
        self._source = open_source(images, reading)
        self._keys: Column[str] = Column(keys)
        self._hashes: Column[bytes | None] = Column(content_sha256)
        has_image = content_sha256.is_valid()
        self._index_of = pc.index_in(keys, value_set=pa.array(self._source.keys, pa.string()))
        lacking = keys.filter(pc.and_(has_image, self._index_of.is_null()))
        if len(lacking):
            first = lacking[0].as_py()
            form = normal_form(first)
            other_form = any(
                differ_in_form(first, key) for key in self._source.keys if normal_form(key) == form
            )
            hint = " (they have this name in another Unicode form)" if other_form else ""
            raise ImagesError(
                f"{images}: {len(lacking)} of {pc.sum(has_image).as_py()} images of the cache are "
                f"missing, such as {first}{hint}; pass the images that the cache was extracted from"
            )

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Return a row's view, uint8 (3, H, W). Raises ImagesError if its image has changed."""
        data = self._read(row)
        try:
            return decode_view(data, self._view)[0]
        except BadImageError as error:
            raise self._unreadable(row, error) from error

    def size(self, row: int) -> tuple[int, int]:
        """Return (height, width) of a row's upright image. Raises ImagesError if it has changed."""
        return upright_size(self._read(row))

    def _read(self, row: int) -> bytes:
        try:
            data = self._source.read(self._index_of[row].as_py())
        except OSError as error:
            raise self._unreadable(row, error) from error
        if hashlib.sha256(data).digest() != self._hashes[row]:
            raise ImagesError(
                f"{self._images}: {self._keys[row]} is not the image that the cache was extracted "
                "from (SHA-256 differs); pass the original images"
            )
        return data

    def _unreadable(self, row: int, error: Exception) -> ImagesError:
        return ImagesError(
            f"{self._images}: {self._keys[row]}: {error}; the extraction read this image; restore "
            "the file"
        )
