"""Atomic file-system writes. A file is complete or absent, whenever the process is killed.

A file is written to a temporary file beside its target and fsynced; then it is renamed, and the
folder is fsynced.
"""

import errno
import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from dtcache.errors import CacheBusyError, CacheDamagedError, DiskError, NoLocksWarning

TEMPORARY = ".tmp-"
NO_LOCK = "DTCACHE_NO_LOCK"
"""Environment variable: if it is set, no folder is locked. Subprocesses inherit it."""
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""Errors by which a file system says that it does not have an operation."""
SYSTEM_FILES = frozenset({"lost+found", ".DS_Store", "Thumbs.db", "desktop.ini"})
SYSTEM_PREFIXES = ("._", ".nfs", ".fuse_hidden")


def is_system_file(name: str) -> bool:
    """Return whether file systems and desktops put files or folders of this name anywhere.

    They belong to nobody's cache: dtcache neither counts nor removes them.
    """
    return name in SYSTEM_FILES or name.startswith(SYSTEM_PREFIXES)


def fsync_folder(folder: Path) -> None:
    """Fsync a folder, so that the names in it are durable. Raises DiskError.

    File systems such as CIFS and some of FUSE cannot fsync a folder; there it is left out.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise _disk_error(folder, 0, error) from error


def temporary_path(target: Path, attempt: str = "") -> Path:
    """Return the temporary file beside `target`; its name contains `attempt`, if one is given."""
    return target.with_name(f"{TEMPORARY}{attempt}{'-' if attempt else ''}{target.name}")


def write_temporary(target: Path, data: bytes | memoryview, attempt: str = "") -> Path:
    """Write and fsync `data` to the temporary file of an attempt at `target`; return its path.

    Raises DiskError with advice. After a failed fsync the file is removed: it must be rewritten,
    because a second fsync may succeed without the data.
    """
    temporary = temporary_path(target, attempt)
    # A new file: a link that somebody put at this name is removed, and never written through.
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _disk_error(target, len(data), error) from error
    return temporary


def publish(temporaries: Mapping[Path, Path]) -> None:
    """Rename temporary files to their targets, then fsync the folders. Raises DiskError."""
    for temporary, target in temporaries.items():
        try:
            os.replace(temporary, target)
        except OSError as error:
            raise _disk_error(target, 0, error) from error
    for folder in sorted({target.parent for target in temporaries.values()}):
        fsync_folder(folder)


def write_file(target: Path, data: bytes | memoryview) -> None:
    """Replace `target` by `data`, atomically and durably. Raises DiskError."""
    publish({write_temporary(target, data): target})


def require_no_links(root: Path, *, folders_only: bool = False) -> None:
    """Raise CacheDamagedError if a folder has a symbolic link anywhere below it.

    A writer would follow the link, and change or delete files outside the folder. With
    `folders_only`, links to files pass, for writers that replace a link instead of following it.
    """
    for folder, folders, files in os.walk(root):
        names = folders if folders_only else [*folders, *files]
        for name in names:
            path = Path(folder, name)
            if path.is_symlink():
                raise CacheDamagedError(
                    f"{path}: expected no symbolic links in a folder that is written, got one to "
                    f"{path.readlink()}; replace it by what it points to"
                )


def make_folders(folder: Path) -> None:
    """Make a folder and its missing parents, durably. Raises DiskError."""
    if not folder.is_dir():
        make_folders(folder.parent)
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def fsync_tree(root: Path) -> None:
    """Fsync every file and folder under a folder. Raises DiskError."""
    for path in sorted(root.rglob("*")):
        if path.is_file():
            with disk_errors(path), open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            fsync_folder(path)
    fsync_folder(root)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Raise any OSError of the block, also another library's, as DiskError about `target`."""
    try:
        yield
    except OSError as error:
        raise _disk_error(target, 0, error) from error


def _disk_error(target: Path, size: int, error: OSError) -> DiskError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = (
        "free some space and run the same command again: it resumes"
        if full
        else "check the disk and its permissions"
    )
    written = f"{target} ({size} bytes)" if size else str(target)
    return DiskError(f"cannot write {written}: {error.strerror or error}; {advice}")


class FolderLock:
    """An exclusive `flock` on `FOLDER/.lock`; the system releases it when the process ends.

    Without a lock if the environment variable DTCACHE_NO_LOCK is set, or if the file system has no
    `flock`, such as Lustre without its mount option, some NFS and some FUSE.

    As a context manager it also undoes a start that fails: if the block raises before `keep()`, a
    folder that was missing is missing again, and one that was empty is empty again. Another attempt
    with other options may then use the folder.
    """

    def __init__(self, folder: Path) -> None:
        """Make the folder if it is missing, and take the lock.

        Warns with NoLocksWarning if the file system has no locks. Raises CacheBusyError if another
        process holds the lock, and DiskError.
        """
        self._folder = folder
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._handle = self._locked()
        with disk_errors(folder):
            self._is_new = not any(self._contents())

    def keep(self) -> None:
        """Let the contents stay if the block raises from here on: they can be resumed."""
        self._is_new = False

    def _locked(self) -> int:
        """Return the handle of the locked file."""
        while True:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                # Python opens files close-on-exec, so that no child keeps the lock alive.
                handle = os.open(
                    self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644
                )
            except OSError as error:
                raise _disk_error(self._folder, 0, error) from error
            if os.environ.get(NO_LOCK):
                return handle
            self._lock(handle)
            if os.fstat(handle).st_nlink:
                return handle
            # Meanwhile a failed start has removed the file, which would lock out nobody.
            os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (*UNSUPPORTED, errno.ENOLCK):
                message = (
                    f"{self._folder}: its file system has no file locks ({error.strerror}), and "
                    "dtcache goes on without one: write this folder from one process at a time. "
                    "With `no_lock` (DTCACHE_NO_LOCK=1) this line is left out"
                )
                warnings.warn(message, NoLocksWarning, stacklevel=4)
                return
            os.close(handle)
            if error.errno != errno.EWOULDBLOCK:
                raise _disk_error(self._folder / ".lock", 0, error) from error
            raise CacheBusyError(
                f"{self._folder} is being written by another process; wait for it or stop it"
            ) from error

    def _contents(self) -> Iterator[Path]:
        """Yield the folder's files and folders, except those of the system and the lock."""
        for path in self._folder.iterdir():
            if path.name != ".lock" and not is_system_file(path.name):
                yield path

    def take_over(self) -> None:
        """Remove the contents, and remove the folder itself if the block raises before `keep()`."""
        self._clear()
        self._is_new = True
        self._made = self._made or [self._folder]

    def _clear(self) -> None:
        for path in list(self._contents()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _undo(self) -> None:
        """Remove what the block has written, the lock's file, and the folders that it made."""
        self._clear()
        (self._folder / ".lock").unlink(missing_ok=True)
        for folder in self._made:
            folder.rmdir()

    def __enter__(self) -> Self:
        """Return the lock itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Undo a failed start, and release the lock."""
        if kind is not None and self._is_new:
            with suppress(OSError):  # the block's own error is the one to report
                self._undo()
        os.close(self._handle)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` if the block succeeds.

    The temporary folder is removed if the block fails. `target` must be missing or empty. Files
    that a killed process left in the temporary folder are removed first. Raises CacheBusyError if
    another process writes the same folder, and DiskError.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    with FolderLock(temporary) as lock:
        lock.take_over()
        yield temporary
        fsync_tree(temporary)
        with disk_errors(target):
            (temporary / ".lock").unlink()
            os.replace(temporary, target)
        fsync_folder(target.parent)
