"""The labelled rows of a cache: those with a mask, or with a label in the cache's index."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtcache.cache.batch import Rows
from dtcache.cache.cache import Cache
from dtcache.class_names import numbered
from dtcache.errors import ImagesError
from dtcache.images import LinkedImages, open_masks
from dtcache.images.stored_images import LENGTH_BYTES
from dtcache.labels import MAX_CLASSES
from dtcache.options.images import ImagesOptions
from dtcache.store.layout import IMAGES
from pipelines.terminal.output import say

NO_CLASS = -1
"""Ignore index of image labels, which are never negative."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledRows:
    """Rows of a cache with their labels."""

    rows: Rows
    """(N,), ascending."""
    truth_NHW: Tensor
    """Class numbers of the unmirrored view: uint8 for masks, int64 (N, 1, 1) for image labels."""
    classes: tuple[str, ...]
    """Names by number."""
    ignore: int
    """Ignore index."""

    def __len__(self) -> int:
        """Return the number of labelled images."""
        return len(self.rows)

    def take(self, indices: Sequence[int] | Rows) -> "LabelledRows":
        """Return the rows at these indices."""
        chosen = np.asarray(indices, np.int64)
        return LabelledRows(
            rows=self.rows[chosen],
            truth_NHW=self.truth_NHW[chosen],
            classes=self.classes,
            ignore=self.ignore,
        )

    @property
    def values(self) -> list[int]:
        """Class numbers that occur, ascending, without the ignore index."""
        values: list[int] = torch.unique(self.truth_NHW[self.truth_NHW != self.ignore]).tolist()
        return values


def images_with_masks(
    cache: Cache,
    root: Path,
    ignore_index: int | None,
    limit: int | None,
    images: Path | None = None,
    reading: ImagesOptions | None = None,
) -> LabelledRows:
    """Return the usable rows whose key has a mask in the folder `root`.

    Masks are cropped and resized like the view. A mask must have the size of its image. Sizes are
    read from the source `images`, opened as `reading` says; without it, only sizes that the cache
    records are checked, and a warning counts the others. Raises ImagesError if no image has a mask,
    if a file is not a mask of its image, or if the masks show fewer than two classes.
    """
    folder = open_masks(root, ignore_index)
    keys = cache.samples["key"].to_pylist()
    usable = cache.reader.usable_rows
    rows = [int(row) for row in usable if folder.has(keys[row])][:limit]
    if not rows:
        example = folder.path(keys[int(usable[0])]) if len(usable) else f"{root}/KEY.png"
        hint = folder.form_hint(keys[int(row)] for row in usable)
        raise ImagesError(
            f"{root}: no mask matches any of the cache's {len(usable)} images{hint}; expected "
            f"PNG files named by their keys, such as {example}"
        )
    sizes = _image_sizes(cache, rows, images, reading)
    if None in sizes:
        say(
            f"warning: the cache does not record the size of {sizes.count(None)} of the "
            f"{len(rows)} images with a mask, so masks of another size are not detected; pass the "
            "cache's images to check them"
        )
    masks = [
        folder.load(keys[row], cache.view, size) for row, size in zip(rows, sizes, strict=True)
    ]
    truth_NHW = np.stack(masks)
    largest = int(truth_NHW[truth_NHW != folder.ignore].max(initial=0))
    labelled = LabelledRows(
        rows=np.array(rows, np.int64),
        truth_NHW=torch.from_numpy(truth_NHW),
        classes=folder.names or numbered(largest + 1),
        ignore=folder.ignore,
    )
    folder.require_several(labelled.values)
    return labelled


def labelled_images(cache: Cache, limit: int | None) -> LabelledRows:
    """Return the usable rows with a label in the cache's index.

    Raises ImagesError if no row has a label, or if a label is out of range.
    """
    labels = cache.samples["label"].to_pylist()
    usable = cache.reader.usable_rows
    rows = [int(row) for row in usable if labels[row] is not None and labels[row] >= 0][:limit]
    if not rows:
        raise ImagesError(
            f"{cache.reader.location}: none of the {len(usable)} images has a label in the cache's "
            "index; pass `masks`, or a cache of images with one sub-folder per class"
        )
    numbers = [int(labels[row]) for row in rows]
    names = cache.reader.manifest.classes
    count = len(names) if names else MAX_CLASSES
    if max(numbers) >= count:
        raise ImagesError(
            f"{cache.reader.location}: expected labels from 0 to {count - 1}, got {max(numbers)}; "
            "number the classes from 0"
        )
    return LabelledRows(
        rows=np.array(rows, np.int64),
        truth_NHW=torch.tensor(numbers)[:, None, None],
        classes=names or numbered(max(numbers) + 1),
        ignore=NO_CLASS,
    )


def _image_sizes(
    cache: Cache, rows: Sequence[int], images: Path | None, reading: ImagesOptions | None
) -> list[tuple[int, int] | None]:
    """Return (height, width) of the images, None if unknown.

    Without the source `images`, a size is known only if the cache stores the image's own bytes:
    such an image has the size of the view.
    """
    content = cache.samples["content_sha256"]
    if images is not None:
        source = LinkedImages(images, cache.samples["key"], content, cache.view, reading)
        return [source.size(row) for row in rows]
    if IMAGES not in cache.reader.manifest.arrays:
        return [None] * len(rows)
    view_size = (cache.view.height, cache.view.width)
    stored = cache.reader.payloads(IMAGES, rows, np.zeros(len(rows)))
    sizes: list[tuple[int, int] | None] = []
    for row, payload in zip(rows, stored, strict=True):
        length = int.from_bytes(payload[:LENGTH_BYTES].tobytes(), "little")
        digest = hashlib.sha256(payload[LENGTH_BYTES : LENGTH_BYTES + length].tobytes()).digest()
        sizes.append(view_size if digest == content[row].as_py() else None)
    return sizes
