"""Only regular files are opened, and no path makes a reader wait."""

import os
import socket
from pathlib import Path

import pytest

from dtcache.regular_files import NotRegularError, open_regular, read_regular


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    """A regular file, also behind a link, is read up to the limit."""
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    with open_regular(path) as file:
        assert file.read() == b"12345"
    assert read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(ValueError, match=r"^expected at most 4 bytes, got 5$"):
        read_regular(path, 4)


@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a device", "a socket"])
def test_anything_else_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """A FIFO without a writer, a folder, an endless device and a socket are refused."""
    path = tmp_path / "odd"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        path = Path("/dev/zero")
    else:
        with (
            socket.socket(socket.AF_UNIX) as listening,
            pytest.raises(OSError, match="No such device or address"),
        ):
            listening.bind(str(path))
            open_regular(path)
        return
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotRegularError, match=f"expected a file, got {kind}"):
        open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_sparse_file_takes_no_memory(tmp_path: Path) -> None:
    """A file of a terabyte without blocks is refused by its size."""
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=rf"at most 1048576 bytes, got {1 << 40}"):
        read_regular(path, 1 << 20)
