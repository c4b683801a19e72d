"""Images in a folder tree."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from dtcache.errors import ImagesError, ImagesNotFoundError
from dtcache.images.encoded import read_image
from dtcache.images.left_out import LeftOut, Reason, is_hidden
from dtcache.images.parquet_index import has_images
from dtcache.images.survey import survey
from dtcache.names import IN_UTF8, is_fit
from dtcache.options.images import ImagesOptions
from dtcache.samples import Column

EXTENSIONS = frozenset(
    (
        ".apng",
        ".avif",
        ".avifs",
        ".bmp",
        ".gif",
        ".j2c",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpc",
        ".jpe",
        ".jpeg",
        ".jpf",
        ".jpg",
        ".jpx",
        ".pbm",
        ".pfm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )
)
"""Every extension of the formats that are decoded (`FORMATS` in encoded.py)."""
ARCHIVES = (".parquet", ".tar")
LISTED_AT_ONCE = 1 << 16


def is_image(name: str) -> bool:
    """Return whether a file's extension, in upper or lower case, is one of an image."""
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return bool(stem) and f"{dot}{extension}".lower() in EXTENSIONS


class FolderSource:
    """A folder tree of images.

    If every image lies in a sub-folder, the first level of sub-folders gives the labels. Links to
    files are followed; links to folders only if `reading.follow_links` is set.
    """

    def __init__(self, root: Path, reading: ImagesOptions | None = None) -> None:
        """List the images under `root`.

        Raises ImagesNotFoundError if there is none, and ImagesError if a file name is not UTF-8 or
        has control characters, if a folder cannot be listed, or if the tree also has Parquet or
        tar files of images in sub-folders.
        """
        self.root = root
        chunks: list[pa.Array] = []
        counts: dict[str, int] = {}
        reading = reading or ImagesOptions()
        listing = Listing(root, follow_links=reading.follow_links)
        keys = iter(listing)
        while chunk := list(islice(keys, LISTED_AT_ONCE)):
            odd = next((key for key in chunk if not is_fit(key)), None)
            if odd is not None:
                raise ImagesError(
                    f"{root}: expected UTF-8 file names without control characters, got {odd!r}; "
                    f"{IN_UTF8}"
                )
            chunks.append(pa.array(chunk, pa.string()))
            for key in chunk:
                folder, slash, _ = key.partition("/")
                counts[folder if slash else ""] = counts.get(folder if slash else "", 0) + 1
        _require_no_archives(root, listing, counts, reading)
        if not chunks:
            left_out = listing.left_out
            except_for = f" (left out: {left_out}{left_out.remedy})" if left_out.counts else ""
            raise ImagesNotFoundError(
                f"no images under {root}{except_for}: expected files ending in "
                f"{', '.join(sorted(EXTENSIONS))}; pass the folder that holds them, a .parquet or "
                "a .tar file"
            )
        self.keys: Column[str] = Column(pa.chunked_array(chunks))
        self.classes: list[str] | None = None
        self.labels: Column[int | None] | None = None
        notes = []
        if "" in counts and len(counts) > 1:
            stray = next(key for key in self.keys if "/" not in key)
            notes.append(
                f"no labels: {sum(counts.values()) - counts['']} of {len(self.keys)} images lie in "
                f"sub-folders, {counts['']} (such as {stray}) beside them; move these away to make "
                "the sub-folders classes"
            )
        elif "" not in counts and _are_downloads(root, counts):
            notes.append(
                f"no labels: the folders {', '.join(sorted(counts)[:3])} are shards of img2dataset"
            )
        elif "" not in counts:
            self.classes = sorted(counts)
            index_of = {name: i for i, name in enumerate(self.classes)}
            # Keys are sorted, so the images of one folder are consecutive.
            labels = np.repeat(
                np.array([index_of[name] for name in counts], np.int32), list(counts.values())
            )
            self.labels = Column(pa.array(labels))
        self.survey = survey(self.keys, self.labels, self.classes, listing.left_out, notes)

    def read(self, index: int) -> bytes:
        """Return the bytes of one file. Raises OSError."""
        return read_image(self.root / self.keys[index])

    def fetches(self, indices: Iterable[int]) -> Iterator[tuple[int, Callable[[], bytes]]]:
        """Yield each index with a function that reads its image."""
        return ((index, partial(self.read, index)) for index in indices)


def _are_downloads(root: Path, folders: Iterable[str]) -> bool:
    """Return whether img2dataset wrote the folders: each has a table or statistics beside it."""
    return all(
        name.isdecimal()
        and ((root / f"{name}.parquet").is_file() or (root / f"{name}_stats.json").is_file())
        for name in folders
    )


def _require_no_archives(
    root: Path, listing: "Listing", counts: dict[str, int], reading: ImagesOptions
) -> None:
    """Raise ImagesError if Parquet or tar files of images lie in sub-folders of `root`."""
    by_folder = {
        folder: name
        for folder, name in listing.archives.items()
        if name.endswith(".tar") or has_images(root / folder / name, reading)
    }
    if not by_folder:
        return
    first = min(by_folder)
    listed = ", ".join(f"{folder}/" for folder in sorted(by_folder)[:3])
    kind = "tar" if by_folder[first].endswith(".tar") else "Parquet"
    if counts:
        raise ImagesError(
            f"{root}: expected one kind of images, got {sum(counts.values())} image files, and "
            f"{kind} files in {listed}; pass {root / first}, or a folder with image files alone"
        )
    one_of = " or another one of them" if len(by_folder) > 1 else ""
    raise ImagesNotFoundError(
        f"no images at the top of {root}: the {kind} files lie in {listed}; pass {root / first}"
        f"{one_of}"
    )


class Listing:
    """The images of a folder tree, and a count of everything that is left out."""

    def __init__(self, root: Path, *, follow_links: bool = False) -> None:
        self.left_out = LeftOut()
        self.archives: dict[str, str] = {}
        """By sub-folder with Parquet or tar files: the name of one of them."""
        self._root = root
        self._follow_links = follow_links

    def __iter__(self) -> Iterator[str]:
        """Yield the relative POSIX paths of all images, sorted as strings.

        A folder is sorted by its name with a slash, so that a depth-first walk yields full paths
        in order. Raises ImagesError if a folder cannot be listed.
        """
        todo = [""]
        while todo:
            key = todo.pop()
            if key and not key.endswith("/"):
                yield key
                continue
            try:
                with os.scandir(self._root / key) as entries:
                    todo += sorted(self._children(key, entries), reverse=True)
            except OSError as error:
                raise ImagesError(
                    f"{self._root / key}: cannot be listed ({error.strerror}); make it readable, "
                    "or pass a folder without it"
                ) from error

    def _children(self, folder: str, entries: Iterable[os.DirEntry[str]]) -> Iterator[str]:
        """Yield the paths of a folder's images, and of its sub-folders with a slash."""
        for entry in entries:
            key = f"{folder}{entry.name}"
            if is_hidden(entry.name):
                self.left_out.add(Reason.HIDDEN, key)
            elif entry.is_symlink():
                yield from self._linked(key, entry)
            elif entry.is_dir(follow_symlinks=False):
                yield f"{key}/"
            elif entry.is_file(follow_symlinks=False):
                yield from self._file(key)
            else:
                self.left_out.add(Reason.SPECIAL, key)

    def _file(self, key: str) -> Iterator[str]:
        if is_image(key):
            yield key
            return
        if key.endswith(ARCHIVES):
            folder, slash, name = key.rpartition("/")
            if slash:
                self.archives.setdefault(folder, name)
            elif key.endswith(".parquet"):
                self.left_out.add(Reason.METADATA, key)
                return
        self.left_out.add_other(key)

    def _linked(self, key: str, entry: os.DirEntry[str]) -> Iterator[str]:
        try:
            target = os.stat(entry.path)
        except OSError:
            self.left_out.add(Reason.NOWHERE, key)
            return
        if stat.S_ISREG(target.st_mode):
            yield from self._file(key)
        elif not stat.S_ISDIR(target.st_mode):
            self.left_out.add(Reason.SPECIAL, key)
        elif not self._follow_links:
            self.left_out.add(Reason.LINKED_FOLDER, key)
        elif self._is_around(key, target):
            self.left_out.add(Reason.CIRCLE, key)
        else:
            yield f"{key}/"

    def _is_around(self, key: str, target: os.stat_result) -> bool:
        """Return whether a linked folder is one of the folders that the link lies in."""
        folder = (self._root / key).parent
        while True:
            if os.path.samestat(os.stat(folder), target):
                return True
            if folder == self._root:
                return False
            folder = folder.parent
