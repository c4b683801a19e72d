"""Opening of files that may come from a stranger: only regular files, so that no read waits."""

import os
import stat
from io import BufferedReader
from pathlib import Path

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(OSError):
    """A path that names a folder, a FIFO, a socket or a device, where a file is expected."""


def open_handle(path: Path | str) -> int:
    """Open a regular file for reading and return its descriptor.

    A FIFO or a device would make a reader wait, or never end. Raises OSError; NotRegularError for
    anything but a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise NotRegularError(
            0, f"expected a file, got {KINDS.get(kind, 'something else')}", str(path)
        )
    return handle


def open_regular(path: Path | str) -> BufferedReader:
    """Open a regular file for reading as bytes. Raises the errors of `open_handle`."""
    return os.fdopen(open_handle(path), "rb")


def read_regular(path: Path | str, limit: int) -> bytes:
    """Return the bytes of a regular file.

    Raises the errors of `open_handle`, and ValueError for a file of more than `limit` bytes, before
    memory is allocated for them.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= limit else b""
    if max(size, len(content)) > limit:
        raise ValueError(f"expected at most {limit} bytes, got {max(size, len(content))}")
    return content
