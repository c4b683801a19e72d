"""Local copies of the files of a cache in an object store, within a limit of bytes.

Several processes share the copies: a file is downloaded by one of them, compared with its SHA-256
and only then renamed to its place. Any process may be killed at any moment.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dtcache.atomic_files import TEMPORARY, disk_errors
from dtcache.errors import ConfigError, DiskError, StorageError
from dtcache.storage.object_store import ObjectStore

LOCK = ".lock"
EVICTED = "c."
"""Names of the files that make room begin with this: Zarr's chunks, so nearly all bytes."""
FOLDER_DIGITS = 32
"""Hexadecimal digits of the name of a cache's folder."""
LOCAL_CACHE = "DTCACHE_LOCAL_CACHE"
"""Environment variable: the folder of local copies."""
LOCAL_CACHE_GB = "DTCACHE_LOCAL_CACHE_GB"
"""Environment variable: the most gigabytes of all local copies."""
DEFAULT_GB = 50
MAX_GB = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalCopies:
    """The folder of all local copies, and its limit."""

    folder: Path
    limit: int
    """Most bytes of all files in the folder; those being downloaded come on top."""


def local_copies(folder: Path | None = None, gigabytes: float | None = None) -> LocalCopies:
    """Return the folder of local copies and its limit.

    Without them, the environment names them; without that, they are ~/.cache/dtcache/copies and 50
    GB. Raises ConfigError for a limit that is not a number over 0.
    """
    if folder is None:
        named = os.environ.get(LOCAL_CACHE)
        user = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        folder = Path(named) if named else Path(user) / "dtcache" / "copies"
    text = str(gigabytes if gigabytes is not None else os.environ.get(LOCAL_CACHE_GB, DEFAULT_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < MAX_GB:
        raise ConfigError(f"`local_cache_size` {text[:40]}: expected a number of gigabytes over 0")
    return LocalCopies(folder=folder, limit=int(limit * 1e9))


class LocalCopy:
    """The local folder of one cache in an object store. Safe to share between threads; picklable.

    Files are downloaded when they are used. If the folder of all copies grows over its limit, the
    files that were used the longest time ago are deleted, whatever cache they belong to. A process
    that has such a file open goes on reading it.
    """

    def __init__(self, store: ObjectStore, identity: str, copies: LocalCopies) -> None:
        """Take the store and an `identity` that changes if the cache does. No file is touched."""
        key = hashlib.sha256(f"{store.address}\0{identity}".encode()).hexdigest()[:FOLDER_DIGITS]
        self.store = store
        self.root = copies.folder / key
        self._identity = identity
        self._copies = copies
        self._evicting = threading.Lock()

    def __reduce__(self) -> tuple[type["LocalCopy"], tuple[ObjectStore, str, LocalCopies]]:
        """Pickle as the arguments."""
        return LocalCopy, (self.store, self._identity, self._copies)

    def fetch(self, path: str, sha256: str, size: int | None = None) -> Path:
        """Return the local file of an object, downloaded if it is not there.

        A local file of this `size` in bytes is taken to be the one that was downloaded. Raises
        StorageNotFoundError, StorageError if the object is not the one of this size and SHA-256
        (hex), and DiskError, also if the object alone is larger than the limit.
        """
        target = self.root / path
        if self._used(target, size):
            return target
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{TEMPORARY}{target.name}")
        with _locked(temporary) as file:
            # Another process may have downloaded it while this one waited for the lock.
            if self._used(target, size):
                temporary.unlink()
                return target
            self._download(path, size, sha256, file)
            self._make_room(os.fstat(file).st_size)
            with disk_errors(target):
                temporary.rename(target)
        return target

    def _used(self, target: Path, size: int | None) -> bool:
        """Return whether a file is there, whole; its age is then that of a file just used."""
        try:
            status = target.stat()
            if size is not None and status.st_size != size:
                return False
            # The time of the last change stays: by it a reader knows the file again.
            os.utime(target, ns=(time.time_ns(), status.st_mtime_ns))
        except FileNotFoundError:
            return False
        return True

    def _download(self, path: str, size: int | None, sha256: str, file: int) -> None:
        """Write an object to an open file, which is emptied first."""
        place = f"{self.store.address}/{path}"
        limit = self._copies.limit
        if (size or 0) > limit:
            raise DiskError(_too_large(place, limit))
        digest = hashlib.sha256()
        received = 0
        with disk_errors(self.root / path):
            os.ftruncate(file, 0)
        for part in self.store.stream(path):
            if received + len(part) > limit:
                raise DiskError(_too_large(place, limit))
            with disk_errors(self.root / path):
                os.pwrite(file, part, received)
            digest.update(part)
            received += len(part)
            if size is not None and received > size:
                break
        if size not in (None, received):
            raise StorageError(
                f"{place}: expected {size} bytes, got {received}{'+' * (received > size)}; the "
                "object was replaced, or the transfer ended early: try again"
            )
        if digest.hexdigest() != sha256:
            raise StorageError(
                f"{place}: expected SHA-256 {sha256[:16]}..., got {digest.hexdigest()[:16]}...; "
                "the object is not the one that was written, or it is being replaced: try again, "
                "or write the cache again"
            )

    def _make_room(self, size: int) -> None:
        """Delete the files that were used the longest time ago, so that `size` more bytes fit."""
        lock = self._copies.folder / LOCK
        with self._evicting, _locked(lock):
            files = []
            for path in self._copies.folder.rglob("*"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    if path.is_file() and path.name.startswith(EVICTED):
                        files.append((status.st_atime_ns, status.st_size, path))
            excess = sum(length for _, length, _ in files) + size - self._copies.limit
            for _, length, path in sorted(files):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= length


def _too_large(place: str, limit: int) -> str:
    return (
        f"{place}: expected at most {limit} bytes, the limit of all local copies, got more; pass a "
        "larger `local_cache_size`"
    )


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold the lock of a file, which is created if it is not there; return its descriptor.

    A killed process releases the lock.
    """
    with disk_errors(path):
        file = _lock(path)
        while file is None:
            file = _lock(path)
    try:
        yield file
    finally:
        os.close(file)


def _lock(path: Path) -> int | None:
    """Return the descriptor of a locked file, or None if another process moved it meanwhile."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(file), path.lstat()):
            return file
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None
