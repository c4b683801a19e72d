"""Mutations of bytes, and of what a path is: a FIFO, a link, a folder, a sparse file."""

import os
import shutil
from pathlib import Path
from random import Random

SPARSE_BYTES = 1 << 30


def mutate_bytes(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Return bytes with one change, and what was changed."""
    changed = bytearray(content)
    at = rng.randrange(len(content)) if content else 0
    kind = rng.randrange(7)
    if kind < 3 and content:
        for _ in range(rng.choice((1, 1, 8))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed), "flipped bits"
    if kind == 3:
        return content[:at], f"cut at {at}"
    if kind == 4 and content:
        stop = min(len(content), at + rng.choice((4, 64, 4096)))
        changed[at:stop] = bytes(stop - at)
        return bytes(changed), f"zeros at {at}"
    if kind == 5:
        return content + rng.randbytes(rng.choice((1, 16, 4096))), "more bytes at the end"
    changed[at:at] = rng.randbytes(rng.choice((1, 8)))
    return bytes(changed), f"more bytes at {at}"


def swap_files(one: Path, other: Path) -> None:
    """Exchange two files."""
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def mutate_path(path: Path, outside: Path, rng: Random) -> str:
    """Replace a file or a folder by something else; return what."""
    kind = rng.choice(("missing", "fifo", "secret", "copy", "folder", "sparse", "zero", "loop"))
    copy = outside / f"copy-{path.name}"
    if kind == "copy":
        _copy(path, copy)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "secret":
        path.symlink_to(outside / "secret.txt")
    elif kind == "copy":
        path.symlink_to(copy)
    elif kind == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif kind == "sparse":
        path.touch()
        os.truncate(path, SPARSE_BYTES)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    return kind


def _copy(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, to)
    else:
        shutil.copyfile(path, to)
