"""Open shard files, at most a given number at a time."""

import errno
import hashlib
import os
import resource
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtcache.errors import CacheDamagedError, CacheError
from dtcache.regular_files import NotRegularError, open_handle

READ_BYTES = 1 << 20
"""Bytes of a file that are hashed at a time."""


def open_limit() -> int:
    """Return how many shard files one reader keeps open.

    It is half of the files that the process may open, within [16, 4096].
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else min(max(soft // 2, 16), 4096)


class OpenFiles:
    """The most recently used files of a folder, kept open. Safe to share between threads."""

    def __init__(self, root: Path, most: int) -> None:
        self._root = root
        self._most = most
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def holds(self, path: str) -> bool:
        """Return whether a file is open."""
        with self._lock:
            return path in self._files

    def forget(self, path: str) -> None:
        """Open a file anew the next time; who reads it now goes on."""
        with self._lock:
            self._files.pop(path, None)

    def open(self, path: str) -> "OpenFile":
        """Return an open file, which stays open while the caller holds it.

        Raises CacheDamagedError if the file is missing, and CacheError if the process may open no
        more files.
        """
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = OpenFile(self._root / path)
                if len(self._files) > self._most:
                    # Not closed here, because another thread may still read the file.
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Identifies a file and its state: another file at its path, or a changed one, differs."""

    device: int
    inode: int
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds."""


class OpenFile:
    """A regular file that is read at byte offsets. It closes when it is garbage-collected."""

    def __init__(self, path: Path) -> None:
        try:
            self.handle = open_handle(path)
        except NotRegularError as error:
            raise CacheDamagedError(str(error.strerror)) from error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise CacheError(
                    f"{path}: {error.strerror}; raise the limit (ulimit -n)"
                ) from error
            raise CacheDamagedError(
                f"{error.strerror}, but the file was there when the cache was opened"
            ) from error

        status = os.fstat(self.handle)
        self.identity = Identity(
            device=status.st_dev,
            inode=status.st_ino,
            size=status.st_size,
            modified=status.st_mtime_ns,
        )

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)

    def will_need(self, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        """Prefetch ranges of the file into the page cache, if the system can; returns at once."""
        if hasattr(os, "posix_fadvise"):
            for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
                os.posix_fadvise(self.handle, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from an offset. Raises CacheDamagedError if the disk fails."""
        try:
            return os.pread(self.handle, size, offset)
        except OSError as error:
            raise CacheDamagedError(f"{error.strerror} at byte {offset}; check the disk") from error

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of the file. Raises CacheDamagedError if the disk fails."""
        digest = hashlib.sha256()
        offset = 0
        while part := self.read(offset, READ_BYTES):
            digest.update(part)  # releases the GIL
            offset += len(part)
        return digest.hexdigest()
