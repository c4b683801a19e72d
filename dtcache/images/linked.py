"""Images of a cache that stores none: read from their source, each checked against the hash that the cache recorded."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtcache.errors import BadImageError, ImagesError
from dtcache.images.source import open_source
from dtcache.images.view import decode_view
from dtcache.spec import ViewSpec


class LinkedImages:
    """Views by row, from the images that a cache was extracted from; safe to share between threads."""

    def __init__(
        self, images: Path, keys: Sequence[str], content_sha256: Sequence[bytes | None], view: ViewSpec
    ) -> None:
        """Find each row's image in a source by key; rows without a hash failed and need none.

        Raises ImagesError naming the first key that the source lacks.
        """
        self._images, self._view = images, view
        self._source = open_source(images)
        self._keys, self._hashes = keys, content_sha256
        index_of = {key: index for index, key in enumerate(self._source.keys)}
        wanted = [key for key, sha256 in zip(keys, content_sha256, strict=True) if sha256 is not None]
        lacking = [key for key in wanted if key not in index_of]
        if lacking:
            raise ImagesError(
                f"{images}: {len(lacking)} of {len(wanted)} images of the cache are not there, such as {lacking[0]}; "
                "give the images that the cache was extracted from"
            )
        self._index_of = index_of

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Return a row's view (3, H, W), uint8. Raises ImagesError where it is not the image that was extracted."""
        key = self._keys[row]
        try:
            data = self._source.read(self._index_of[key])
            if hashlib.sha256(data).digest() != self._hashes[row]:
                raise ImagesError(
                    f"{self._images}: {key} is not the image that the cache was extracted from (SHA-256 differs); "
                    "give the images that it was extracted from"
                )
            return decode_view(data, self._view)[0]
        except (OSError, BadImageError) as error:
            raise ImagesError(f"{self._images}: {key}: {error}; it could be read when the cache was made") from error
