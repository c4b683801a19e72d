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
"""Larger files fail: an image within the limit of pixels never needs as many bytes."""
LISTED_AT_ONCE = 1 << 16


def is_image(name: str) -> bool:
    """Return whether a file's extension, in upper or lower case, is one of an image."""
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return bool(stem) and f"{dot}{extension}".lower() in EXTENSIONS


class FolderSource:
    """A folder tree of images.

    If every image lies in a sub-folder, the first level of sub-folders gives the labels. Links to
    files are followed, links to folders are not.
    """

    def __init__(self, root: Path) -> None:
        """List the images under `root`.

        Raises ImagesNotFoundError if there is none, and ImagesError if a file name is not printable
        UTF-8 or a folder cannot be listed.
        """
        self.root = root
        chunks: list[pa.Array] = []
        counts: dict[str, int] = {}
        keys = list_images(root)
        while chunk := list(islice(keys, LISTED_AT_ONCE)):
            odd = next((key for key in chunk if not key.isprintable()), None)
            if odd is not None:
                raise ImagesError(
                    f"{root}: expected printable UTF-8 file names, got {odd!r}; rename the file"
                )
            chunks.append(pa.array(chunk, pa.string()))
            for key in chunk:
                folder, slash, _ = key.partition("/")
                counts[folder if slash else ""] = counts.get(folder if slash else "", 0) + 1
        if not chunks:
            raise ImagesNotFoundError(
                f"no images under {root}: expected files ending in "
                f"{', '.join(sorted(EXTENSIONS))}; pass the folder that holds them, a .parquet or "
                "a .tar file"
            )
        self.keys: Column[str] = Column(pa.chunked_array(chunks))
        self.classes: list[str] | None = None
        self.labels: Column[int | None] | None = None
        if "" not in counts:
            self.classes = sorted(counts)
            index_of = {name: i for i, name in enumerate(self.classes)}
            # Keys are sorted, so the images of one folder are consecutive.
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
    """Return the bytes of one encoded image. Raises OSError, also if it has too many bytes."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise OSError(f"{size} bytes, over the limit of {MAX_FILE_BYTES}")
        return file.read()


def list_images(root: Path) -> Iterator[str]:
    """Yield the relative POSIX paths of all images under a folder, sorted as strings.

    A folder is sorted by its name with a slash, so that a depth-first walk yields full paths in
    order. Raises ImagesError if a folder cannot be listed.
    """
    todo = [""]
    while todo:
        key = todo.pop()
        if key and not key.endswith("/"):
            yield key
            continue
        try:
            with os.scandir(root / key) as entries:
                children = (
                    f"{key}{entry.name}/"
                    if entry.is_dir(follow_symlinks=False)
                    else f"{key}{entry.name}"
                    for entry in entries
                    if entry.is_dir(follow_symlinks=False)
                    or (is_image(entry.name) and entry.is_file())
                )
                todo += sorted(children, reverse=True)
        except OSError as error:
            raise ImagesError(
                f"{root / key}: cannot be listed ({error.strerror}); make it readable, or pass a "
                "folder without it"
            ) from error
