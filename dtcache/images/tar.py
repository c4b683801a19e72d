"""Images in WebDataset tar shards: one pass over the headers, then random access."""

import os
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa

from dtcache.errors import ImagesError, ImagesNotFoundError
from dtcache.images.duplicate_keys import first_repeat, require_unique
from dtcache.images.folder import EXTENSIONS, MAX_FILE_BYTES, is_image
from dtcache.samples import Column

MAX_HEADER_BYTES = 1 << 20
"""Limit of header bytes from one member to the next, such as long names and extended headers."""
MAX_LABEL_BYTES = 32
BLOCK = 512
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Progress(Protocol):
    """Counts finished units of work."""

    def advance(self, count: int = 1) -> None:
        """Add finished units."""


Track = Callable[[str, int], AbstractContextManager[Progress]]
"""Shows the progress of work with a title and a number of units."""


class TarSource:
    """Uncompressed tar files.

    Every image in them is a sample; a `.cls` file gives its class index. A key is the image's path
    without its extension. If two tars share a key, every key is prefixed with the name of its tar.
    """

    def __init__(self, files: Sequence[Path], track: Track | None = None) -> None:
        """Read the headers of all files.

        Raises ImagesError if a tar is compressed, damaged or truncated, if an image in it is a
        link, sparse or at an absolute path, if a label is not a number, and if two images of a tar
        have the same key.
        """
        self._files = list(files)
        starts = [0]
        self._offsets = array("q")
        self._sizes = array("q")
        keys: list[pa.Array] = []
        labels: list[pa.Array] = []
        size = sum(file.stat().st_size for file in files if file.exists())
        with track("index tar shards, MiB", size >> 20) if track else nullcontext() as progress:
            for file in files:
                index = TarIndex(file, progress)
                keys.append(pa.array(index.keys, pa.string()))
                labels.append(pa.array(index.labels, pa.int32()))
                self._offsets += index.offsets
                self._sizes += index.sizes
                starts.append(len(self._offsets))
        self._starts = np.array(starts)
        if not self._offsets:
            raise ImagesNotFoundError(
                f"no images in {', '.join(map(str, files[:3]))}: expected files ending in "
                f"{', '.join(sorted(EXTENSIONS))} in the tar; repack it, or leave it out"
            )
        if first_repeat(pa.chunked_array(keys)) is not None:
            keys = [
                pa.array([f"{file.stem}/{key}" for key in tar_keys.to_pylist()], pa.string())
                for file, tar_keys in zip(files, keys, strict=True)
            ]
        self.keys: Column[str] = Column(pa.chunked_array(keys))
        all_labels = pa.chunked_array(labels)
        self.labels: Column[int | None] | None = (
            Column(all_labels) if all_labels.null_count < len(all_labels) else None
        )
        self.classes: list[str] | None = None

    def read(self, index: int) -> bytes:
        """Return the bytes of one image. Raises OSError."""
        file = self._files[int(np.searchsorted(self._starts, index, "right")) - 1]
        size = self._sizes[index]
        if size > MAX_FILE_BYTES:
            raise OSError(f"{size} bytes, over the limit of {MAX_FILE_BYTES}")
        with open(file, "rb", buffering=0) as opened:
            data = os.pread(opened.fileno(), size, self._offsets[index])
        if len(data) != size:
            raise OSError(f"{file.name} ends {size - len(data)} bytes before the image does")
        return data

    def fetches(self, indices: Iterable[int]) -> Iterator[tuple[int, Callable[[], bytes]]]:
        """Yield each index with a function that reads its image."""
        return ((index, partial(self.read, index)) for index in indices)


class TarIndex:
    """Names, offsets, sizes and labels of the images of one tar, in the tar's order."""

    def __init__(self, file: Path, progress: Progress | None = None) -> None:
        """Read the headers, counting MiB on `progress`. Raises ImagesError."""
        self.keys: list[str] = []
        self.offsets = array("q")
        self.sizes = array("q")
        names: list[str] = []
        classes: dict[str, int] = {}
        counted = 0
        try:
            with open(file, "rb", buffering=0) as opened:
                for member in _members(file, opened):
                    name = member.name.removeprefix("./")
                    if is_image(name):
                        _require_plain(file, member)
                        names.append(name)
                        self.keys.append(name.rpartition(".")[0])
                        self.offsets.append(member.offset_data)
                        self.sizes.append(member.size)
                    elif name.endswith(".cls") and member.isreg():
                        classes[group_of(name)] = _label(file, member, opened)
                    if progress is not None and member.offset >> 20 > counted:
                        progress.advance((member.offset >> 20) - counted)
                        counted = member.offset >> 20
        except OSError as error:
            raise ImagesError(
                f"{file}: cannot be read ({error.strerror}); download it again or leave it out"
            ) from error
        require_unique(
            pa.chunked_array([self.keys], pa.string()),
            lambda i: f"{names[i]} at byte {self.offsets[i]} of {file}",
            "rename one of them and pack the tar again",
        )
        self.labels = [classes.get(group_of(name)) for name in names]


def group_of(name: str) -> str:
    """Return a member's WebDataset sample: its path up to the first dot of the file name."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


class _Headers:
    """A file object that gives tarfile only headers: hostile sizes then cost no memory or time."""

    def __init__(self, opened: BinaryIO) -> None:
        self._opened = opened
        self._at = 0
        self.left = MAX_HEADER_BYTES

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int) -> None:
        self._at = offset

    def read(self, size: int) -> bytes:
        self.left -= max(1, size)
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER_BYTES} bytes")
        data = os.pread(self._opened.fileno(), size, self._at)
        self._at += len(data)
        return data


def _members(file: Path, opened: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield a tar's members.

    Raises OSError, and ImagesError if the tar is compressed, damaged or truncated.
    """
    size = os.fstat(opened.fileno()).st_size
    magic = os.pread(opened.fileno(), 8, 0)
    for start, kind in COMPRESSED.items():
        if magic.startswith(start):
            raise ImagesError(
                f"{file}: compressed with {kind}, which does not allow random access; decompress it"
            )
    headers = _Headers(opened)
    end = 0
    try:
        tar = tarfile.TarFile(
            fileobj=headers,  # type: ignore[arg-type]
            mode="r",
            encoding="utf-8",
            errors="surrogateescape",
        )
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every member
            if member.size < 0 or member.offset < end:
                raise ImagesError(
                    f"{file}: damaged: {member.name!r} at byte {member.offset} has {member.size} "
                    "bytes"
                )
            end = member.offset_data + (member.size if member.isreg() else 0)
            if end > size:
                raise ImagesError(
                    f"{file}: cut off: {member.name!r} ends at byte {end}, the file at {size}; "
                    "copy it again"
                )
            yield member
            headers.left = MAX_HEADER_BYTES
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, ImagesError):
            raise
        raise ImagesError(
            f"{file}: not a readable tar file ({error}); pack it again or leave it out"
        ) from error
    # tarfile treats a damaged header as the end of the archive.
    if os.pread(opened.fileno(), BLOCK, tar.offset) != bytes(BLOCK):
        defect = "cut off: no end-of-archive" if tar.offset + BLOCK > size else "damaged: no header"
        raise ImagesError(f"{file}: {defect} at byte {tar.offset}; copy or pack it again")


def _require_plain(file: Path, member: tarfile.TarInfo) -> None:
    """Raise ImagesError unless an image is a plain file at a plain relative path."""
    if not member.isreg() or member.issparse():
        kind = (
            "a sparse file"
            if member.isreg()
            else "a link"
            if member.issym() or member.islnk()
            else "no file"
        )
        raise ImagesError(
            f"{file}: {member.name!r} is {kind}; pack the tar again with the images themselves"
        )
    parts = member.name.split("/")
    if not member.name.isprintable() or parts[0] == "" or ".." in parts:
        raise ImagesError(
            f"{file}: expected printable relative paths, got {member.name!r}; pack the tar again"
        )


def _label(file: Path, member: tarfile.TarInfo, opened: BinaryIO) -> int:
    """Return the class index in a `.cls` member, decimal text."""
    text = os.pread(opened.fileno(), min(member.size, MAX_LABEL_BYTES), member.offset_data).strip()
    if member.size > MAX_LABEL_BYTES or not text.isdigit() or int(text) >= 1 << 31:
        raise ImagesError(
            f"{file}: {member.name!r}: expected a class index such as 7, got {text!r}; number the "
            "classes"
        )
    return int(text)
