"""Images in WebDataset tar shards: one pass over the headers, then random access."""

import os
import tarfile
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa

from dtcache.errors import ImagesError, ImagesNotFoundError
from dtcache.images.duplicate_keys import first_repeat, require_unique
from dtcache.images.encoded import read_image
from dtcache.images.folder import EXTENSIONS, is_image
from dtcache.images.left_out import LeftOut, Reason, is_hidden
from dtcache.images.survey import survey
from dtcache.names import is_fit
from dtcache.regular_files import open_handle
from dtcache.samples import Column

MAX_HEADER_BYTES = 1 << 20
"""Limit of header bytes from one member to the next, such as long names and extended headers."""
MAX_LABEL_BYTES = 32
BLOCK = 512
SCANNED_AT_ONCE = 1 << 20
"""Bytes read at once behind the end of an archive."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Progress(Protocol):
    """Counts finished units of work."""

    def advance(self, count: int = 1) -> None:
        """Add finished units."""


Track = Callable[[str, int], AbstractContextManager[Progress]]
"""Shows the progress of work with a title and a number of units."""


class TarSource:
    """Uncompressed tar files.

    Every image in them is a sample; a `.cls` file gives its class index (see `TarIndex`). A key is
    the image's path without its extension. If two tars share a key, every key is prefixed with the
    name of its tar. Hidden names are left out.
    """

    def __init__(
        self,
        files: Sequence[Path],
        track: Track | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        """Read the headers of all files.

        `left_out` counts what was left out beside the files. Raises ImagesError if a tar is
        compressed, damaged or truncated, if it holds a second archive, if an image in it is a link,
        sparse or at an absolute path, if a label is not a number, if it is ambiguous which label an
        image has, and if two images of a tar have the same key.
        """
        left_out = left_out or LeftOut()
        self._files = list(files)
        starts = [0]
        self._offsets = array("q")
        self._sizes = array("q")
        keys: list[pa.Array] = []
        labels: list[pa.Array] = []
        size = sum(file.stat().st_size for file in files if file.exists())
        with track("index tar shards, MiB", size >> 20) if track else nullcontext() as progress:
            for file in files:
                index = TarIndex(file, left_out, progress)
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
        self.survey = survey(self.keys, self.labels, None, left_out)

    def read(self, index: int) -> bytes:
        """Return the bytes of one image. Raises OSError."""
        file = self._files[int(np.searchsorted(self._starts, index, "right")) - 1]
        size = self._sizes[index]
        data = read_image(file, self._offsets[index], size)
        if len(data) != size:
            raise OSError(f"{file.name} ends {size - len(data)} bytes before the image does")
        return data

    def fetches(self, indices: Iterable[int]) -> Iterator[tuple[int, Callable[[], bytes]]]:
        """Yield each index with a function that reads its image."""
        return ((index, partial(self.read, index)) for index in indices)


class TarIndex:
    """Names, offsets, sizes and labels of the images of one tar, in the tar's order.

    A `.cls` file labels the images whose names start with its stem, up to a dot or the end: of
    several such files, the one with the longest stem. Without one, an image has the label of the
    only `.cls` file of its WebDataset sample whose stem continues the image's own.
    """

    def __init__(
        self, file: Path, left_out: LeftOut | None = None, progress: Progress | None = None
    ) -> None:
        """Read the headers, counting MiB on `progress` and the rest in `left_out`.

        Raises ImagesError.
        """
        self.keys: list[str] = []
        self.offsets = array("q")
        self.sizes = array("q")
        self._file = file
        self._left_out = left_out or LeftOut()
        names: list[str] = []
        labels: dict[str, tuple[int, int]] = {}
        counted = 0
        try:
            with open(open_handle(file), "rb", buffering=0) as opened:
                for member in self._members(opened):
                    name = member.name.removeprefix("./")
                    if any(map(is_hidden, name.split("/"))):
                        if not member.isdir():
                            self._left_out.add(Reason.HIDDEN, name)
                    elif is_image(name):
                        _require_plain(file, member)
                        names.append(name)
                        self.keys.append(name.rpartition(".")[0])
                        self.offsets.append(member.offset_data)
                        self.sizes.append(member.size)
                    elif name.endswith(".cls") and member.isreg():
                        self._add_label(labels, member, opened)
                    elif not member.isdir():
                        self._left_out.add_other(name)
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
        self.labels = self._label_images(
            names, {stem: label for stem, (label, _) in labels.items()}
        )

    def _members(self, opened: BinaryIO) -> Iterator[tarfile.TarInfo]:
        """Yield the members; count a tar with bytes after its end."""
        end = yield from _members(self._file, opened)
        if end is not None:
            self._left_out.add(Reason.TRAILING, f"{self._file.name} from byte {end}")

    def _add_label(
        self, labels: dict[str, tuple[int, int]], member: tarfile.TarInfo, opened: BinaryIO
    ) -> None:
        """Add a label and the byte of its member, by stem. Raises ImagesError if there are two."""
        label = _label(self._file, member, opened)
        stem = member.name.removeprefix("./").removesuffix(".cls")
        known, byte = labels.setdefault(stem, (label, member.offset))
        if known != label:
            raise ImagesError(
                f"{self._file}: two files {stem}.cls, with the labels {known} at byte {byte} and "
                f"{label} at byte {member.offset}; leave one of them out and pack the tar again"
            )

    def _label_images(self, names: list[str], labels: dict[str, int]) -> list[int | None]:
        """Return the label of each image. Raises ImagesError if it is ambiguous."""
        stems = set(self.keys)
        # Labels that belong to no image by their exact name, by WebDataset sample.
        loose: dict[str, list[str]] = {}
        for stem in labels:
            if stem not in stems:
                loose.setdefault(group_of(stem), []).append(stem)
        used = set()
        image_labels: list[int | None] = []
        for name, key in zip(names, self.keys, strict=True):
            label_stem = _longest_prefix(key, labels)
            if label_stem is None:
                candidates = loose.get(group_of(name), [])
                others = [other for other in candidates if not other.startswith(f"{key}.")]
                if others or len(candidates) > 1:
                    listed = " and ".join(f"{other}.cls" for other in (others or candidates)[:2])
                    raise ImagesError(
                        f"{self._file}: it is ambiguous whether {name} has the label of {listed}: "
                        f"both share the sample {group_of(name)}, but expected {key}.cls; rename "
                        "the label and pack the tar again"
                    )
                label_stem = candidates[0] if candidates else None
            used.add(label_stem)
            image_labels.append(labels[label_stem] if label_stem is not None else None)
        for unused in sorted(labels.keys() - used):
            self._left_out.add(Reason.LABEL, f"{unused}.cls")
        return image_labels


def group_of(name: str) -> str:
    """Return a member's WebDataset sample: its path up to the first dot of the file name."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _longest_prefix(key: str, labels: dict[str, int]) -> str | None:
    """Return the longest stem of a label that is an image's key up to a dot, or the key itself."""
    folder, slash, last = key.rpartition("/")
    while last:
        if f"{folder}{slash}{last}" in labels:
            return f"{folder}{slash}{last}"
        last = last.rpartition(".")[0]
    return None


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


def _members(file: Path, opened: BinaryIO) -> Generator[tarfile.TarInfo, None, int | None]:
    """Yield a tar's members, and return the first byte that is not zero after the archive's end.

    Raises OSError, and ImagesError if the tar is compressed, damaged or truncated, or if another
    archive follows.
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
    return _require_no_second(file, opened, tar.offset)


def _require_no_second(file: Path, opened: BinaryIO, end: int) -> int | None:
    """Return the first byte that is not zero after the end of an archive, or None.

    Raises ImagesError if another archive starts there.
    """
    while data := os.pread(opened.fileno(), SCANNED_AT_ONCE, end):
        zeros = len(data) - len(data.lstrip(b"\0"))
        if zeros == len(data):
            end += len(data)
            continue
        start = (end + zeros) // BLOCK * BLOCK
        try:
            tarfile.TarInfo.frombuf(
                os.pread(opened.fileno(), BLOCK, start), "utf-8", "surrogateescape"
            )
        except tarfile.HeaderError:
            return end + zeros
        raise ImagesError(
            f"{file}: expected one archive, got several: another one starts at byte {start}; "
            "unpack them with tar --ignore-zeros, and pack one tar"
        )
    return None


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
    if not is_fit(member.name) or parts[0] == "" or ".." in parts:
        raise ImagesError(
            f"{file}: expected relative UTF-8 paths without control characters, got "
            f"{member.name!r}; pack the tar again"
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
