"""The labelled images of a cache: which rows have a mask or a label, and what it says."""

import hashlib
import sys
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
from dtcache.store.layout import IMAGES

NO_CLASS = -1
"""What counts nowhere among image labels; they have no such value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """Labelled rows of a cache."""

    rows: Rows
    """(N,): by row."""
    truth_NHW: Tensor
    """uint8 class numbers of the unmirrored view; int64 (N, 1, 1) where images are labelled as a whole."""
    classes: tuple[str, ...]
    """Names by number."""
    ignore: int
    """The value that counts nowhere."""

    def __len__(self) -> int:
        """Return the number of labelled images."""
        return len(self.rows)

    def part(self, places: Sequence[int] | Rows) -> "Labelled":
        """Return some of them."""
        chosen = np.asarray(places, np.int64)
        return Labelled(
            rows=self.rows[chosen],
            truth_NHW=self.truth_NHW[chosen],
            classes=self.classes,
            ignore=self.ignore,
        )

    @property
    def values(self) -> list[int]:
        """Class numbers that occur, in order."""
        found: list[int] = torch.unique(self.truth_NHW[self.truth_NHW != self.ignore]).tolist()
        return found


def images_with_masks(
    cache: Cache, root: Path, ignore: int | None, limit: int | None, images: Path | None = None
) -> Labelled:
    """Return the usable rows whose key has a mask in a folder, and the masks as the view shows them.

    Masks must have their images' sizes: read from the source in `images`, else as far as the cache knows them; stderr
    says how many it does not. Raises ImagesError where there is none, for one that is no mask of its image, and where
    they show fewer than two classes.
    """
    folder = open_masks(root, ignore)
    keys = cache.samples["key"].to_pylist()
    usable = cache.reader.usable_rows
    rows = [int(row) for row in usable if folder.has(keys[row])][:limit]
    if not rows:
        example = folder.path(keys[int(usable[0])]) if len(usable) else f"{root}/KEY.png"
        raise ImagesError(
            f"{root}: no mask matches any of the cache's {len(usable)} images; expected PNG files named by their keys, "
            f"such as {example}"
        )
    sizes = _sizes(cache, rows, images)
    if None in sizes:
        print(
            f"warning: the cache does not know the size of {sizes.count(None)} of the {len(rows)} images with a mask, "
            "and a mask of another size goes unnoticed; give --images IMAGES to check",
            file=sys.stderr,
        )
    masks = [
        folder.load(keys[row], cache.view, size) for row, size in zip(rows, sizes, strict=True)
    ]
    truth = np.stack(masks)
    classes = folder.names or numbered(int(truth[truth != folder.ignore].max(initial=0)) + 1)
    labelled = Labelled(
        rows=np.array(rows, np.int64),
        truth_NHW=torch.from_numpy(truth),
        classes=classes,
        ignore=folder.ignore,
    )
    folder.require_several(labelled.values)
    return labelled


def labelled_images(cache: Cache, limit: int | None) -> Labelled:
    """Return the usable rows that have a label in the cache's index. Raises ImagesError where there is none."""
    labels = cache.samples["label"].to_pylist()
    usable = cache.reader.usable_rows
    rows = [int(row) for row in usable if labels[row] is not None and labels[row] >= 0][:limit]
    if not rows:
        raise ImagesError(
            f"{cache.reader.root}: none of the {len(usable)} images has a label in the cache's index; give --masks, or "
            "a cache of images with one sub-folder a class"
        )
    numbers = [int(labels[row]) for row in rows]
    names = cache.reader.manifest.classes
    count = len(names) if names else MAX_CLASSES
    if max(numbers) >= count:
        raise ImagesError(
            f"{cache.reader.root}: expected labels from 0 to {count - 1}, got {max(numbers)}; number the classes from 0"
        )
    return Labelled(
        rows=np.array(rows, np.int64),
        truth_NHW=torch.tensor(numbers)[:, None, None],
        classes=names or numbered(max(numbers) + 1),
        ignore=NO_CLASS,
    )


def _sizes(cache: Cache, rows: Sequence[int], images: Path | None) -> list[tuple[int, int] | None]:
    """Return the (height, width) of images, None where it is not known.

    Without their source a cache knows those that are stored in their own bytes.
    """
    content = cache.samples["content_sha256"]
    if images is not None:
        source = LinkedImages(images, cache.samples["key"], content, cache.view)
        return [source.size(row) for row in rows]
    if IMAGES not in cache.reader.manifest.arrays:
        return [None] * len(rows)
    sizes: list[tuple[int, int] | None] = []
    for row, payload in zip(
        rows, cache.reader.payloads(IMAGES, rows, np.zeros(len(rows))), strict=True
    ):
        length = int.from_bytes(payload[:LENGTH_BYTES].tobytes(), "little")
        own = hashlib.sha256(payload[LENGTH_BYTES : LENGTH_BYTES + length].tobytes()).digest()
        sizes.append((cache.view.height, cache.view.width) if own == content[row].as_py() else None)
    return sizes
