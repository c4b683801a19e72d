"""Images in a folder tree."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from dtcache.errors import ImagesError, ImagesNotFoundError
from dtcache.samples import Column

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
MAX_FILE_BYTES = 1 << 30
"""A larger image fails: nothing that the view's limit of pixels lets through needs as much."""
LISTED_AT_ONCE = 1 << 16


def is_image(name: str) -> bool:
    """Return whether a file of this name is taken for an image: by its extension, in either case."""
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return bool(stem) and f"{dot}{extension}".lower() in EXTENSIONS


class FolderSource:
    """A folder tree; the first level of sub-folders, where every image lies in one, gives the
    labels.

    Links to files are followed, links to folders are not.
    """

    def __init__(self, root: Path) -> None:
        """List the images under `root`.

        Raises ImagesNotFoundError where there is none, ImagesError for a name that is no printable
        UTF-8 and for a folder that cannot be listed.
        """
        self.root = root
        chunks: list[pa.Array] = []
        counts: dict[str, int] = {}
        keys = list_images(root)
        while part := list(islice(keys, LISTED_AT_ONCE)):
            odd = next((key for key in part if not key.isprintable()), None)
            if odd is not None:
                raise ImagesError(
                    f"{root}: expected printable UTF-8 file names, got {odd!r}; rename the file"
                )
            chunks.append(pa.array(part, pa.string()))
            for key in part:
                folder, slash, _ = key.partition("/")
                counts[folder if slash else ""] = counts.get(folder if slash else "", 0) + 1
        if not chunks:
            raise ImagesNotFoundError(
                f"no images under {root}: expected files ending in "
                f"{', '.join(sorted(EXTENSIONS))}; give the folder that holds them, a .parquet or "
                "a .tar file"
            )
        self.keys: Column[str] = Column(pa.chunked_array(chunks))
        self.classes: list[str] | None = None
        self.labels: Column[int | None] | None = None
        if "" not in counts:
            self.classes = sorted(counts)
            index_of = {name: i for i, name in enumerate(self.classes)}
            # Keys are sorted, so that those of one folder run together.
            labels = np.repeat(
                np.array([index_of[name] for name in counts], np.int32), list(counts.values())
            )
            self.labels = Column(pa.array(labels))

    def read(self, index: int) -> bytes:
        """Return the bytes of one file. Raises OSError."""
        return read_bounded(self.root / self.keys[index])

    def fetches(self, indices: Iterable[int]) -> Iterator[tuple[int, Callable[[], bytes]]]:
        """Yield each index with a function that reads its image."""
        return ((index, partial(self.read, index)) for index in indices)


def read_bounded(path: Path) -> bytes:
    """Return the bytes of one encoded image. Raises OSError, for one over the limit of bytes too."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise OSError(f"{size} bytes, over the limit of {MAX_FILE_BYTES}")
        return file.read()


def list_images(root: Path) -> Iterator[str]:
    """Yield the relative POSIX paths of all images under a folder, sorted as strings.

    A folder sorts as its name with a slash: then walking it in place gives the order of the whole
    paths. Raises ImagesError where a folder cannot be listed.
    """
    todo = [""]
    while todo:
        key = todo.pop()
        if key and not key.endswith("/"):
            yield key
            continue
        try:
            with os.scandir(root / key) as entries:
                found = (
                    f"{key}{entry.name}/"
                    if entry.is_dir(follow_symlinks=False)
                    else f"{key}{entry.name}"
                    for entry in entries
                    if entry.is_dir(follow_symlinks=False)
                    or (is_image(entry.name) and entry.is_file())
                )
                todo += sorted(found, reverse=True)
        except OSError as error:
            raise ImagesError(
                f"{root / key}: cannot be listed ({error.strerror}); make it readable, or give a "
                "folder without it"
            ) from error
