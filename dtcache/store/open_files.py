"""Open shard files, a bounded number at a time."""

import errno
import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtcache.errors import CacheDamagedError, CacheError


def open_limit() -> int:
    """Return how many shards one reader keeps open: half of what the process may open, within [16, 4096]."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else min(max(soft // 2, 16), 4096)


class OpenFiles:
    """The most recently used files of a folder, open; safe to share between threads."""

    def __init__(self, root: Path, most: int) -> None:
        self._root = root
        self._most = most
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, path: str) -> "OpenFile":
        """Return an open file; it stays open for as long as the caller holds it.

        Raises CacheDamagedError, and CacheError where the process may open no more files.
        """
        with self._lock:
            found = self._files.get(path)
            if found is None:
                found = self._files[path] = OpenFile(self._root / path)
                if len(self._files) > self._most:
                    # Not closed here: another thread may be reading it; it closes when the last user lets go.
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return found


class OpenFile:
    """A file for reading at places; it closes when nobody holds it."""

    def __init__(self, path: Path) -> None:
        try:
            self.handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise CacheError(
                    f"{path}: {error.strerror}; raise the limit (ulimit -n)"
                ) from error
            raise CacheDamagedError(
                f"{error.strerror}, but it was there when the cache was opened"
            ) from error

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)

    def will_need(self, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        """Let the system read stretches of the file into its page cache, where it knows how; returns at once."""
        if hasattr(os, "posix_fadvise"):
            for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
                os.posix_fadvise(self.handle, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes at a place. Raises CacheDamagedError where the disk fails."""
        try:
            return os.pread(self.handle, size, offset)
        except OSError as error:
            raise CacheDamagedError(f"{error.strerror} at byte {offset}; check the disk") from error
