"""A large file is read only if its header explains its size."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtcache.images import encoded
from dtcache.images.encoded import read_image


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take files over 1,000 bytes as large."""
    monkeypatch.setattr(encoded, "SMALL_BYTES", 1000)


def noise(side: int) -> Image.Image:
    """Return a random RGB image, which no format compresses."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.jpg", "a.ppm"])
def test_a_large_image_is_read(tmp_path: Path, name: str) -> None:
    """An honest image is returned whole, from the middle of an archive too."""
    path = tmp_path / name
    noise(64).save(path)
    content = path.read_bytes()
    assert len(content) > 1000
    assert read_image(path) == content
    archive = tmp_path / "archive"
    archive.write_bytes(b"x" * 512 + content + b"y" * 512)
    assert read_image(archive, 512, len(content)) == content


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.jpg"])
def test_a_sparse_tail_is_refused_unread(tmp_path: Path, name: str) -> None:
    """A small image with a gigabyte of nothing behind it is refused by the size in its header."""
    path = tmp_path / name
    noise(20).save(path)
    os.truncate(path, 1 << 30)
    with pytest.raises(OSError, match=r"^1073741824 bytes, too many for 20x20 pixels$"):
        read_image(path)


def test_a_sparse_file_is_refused_unread(tmp_path: Path) -> None:
    """A gigabyte of zeros named as an image is refused by its first bytes."""
    path = tmp_path / "a.png"
    path.touch()
    os.truncate(path, 1 << 30)
    with pytest.raises(OSError, match=r"^1073741824 bytes, and no image in the first 1048576 of"):
        read_image(path)


@pytest.mark.parametrize("content", [b"II*\0", b"MM\0*\0\0\0\x08", b"II*\0\x08\0\0\0\xff\xff"])
def test_a_cut_directory_is_refused(tmp_path: Path, content: bytes) -> None:
    """A large TIFF file whose directory is cut off or states no size is refused."""
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    os.truncate(path, 2000)
    with pytest.raises(OSError, match="2000 bytes, and no image in the first 2000 of them"):
        read_image(path)


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    """A FIFO with the name of an image makes no reader wait."""
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(OSError, match="expected a file, got a FIFO"):
        read_image(tmp_path / "a.png")
