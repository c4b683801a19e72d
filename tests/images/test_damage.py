"""Broken images are failures with a reason, and none is decoded wrongly."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtcache.errors import ImagesError
from dtcache.images import FolderSource, decode_view, load_views
from dtcache.images.damage import damage
from dtcache.images.masks import open_masks
from dtcache.recipe import ViewSpec

RNG = np.random.default_rng(0)
SIDE = 64
VIEW = ViewSpec(height=SIDE, width=SIDE)
Y, X = np.mgrid[:SIDE, :SIDE]
WAVES = np.stack([128 + 90 * np.sin(X / 9 + Y / 7), 128 + 80 * np.cos(X / 5), (X + Y) * 2], 2)
PICTURE = np.clip(WAVES + RNG.integers(-12, 12, WAVES.shape), 0, 255).astype(np.uint8)
KINDS = {
    "jpg": ("JPEG", {"quality": 90}),
    "progressive.jpg": ("JPEG", {"quality": 90, "progressive": True}),
    "optimized.jpg": ("JPEG", {"quality": 75, "optimize": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"quality": 80}),
    "lossless.webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "tif": ("TIFF", {"compression": "tiff_lzw"}),
    "bmp": ("BMP", {}),
    "ppm": ("PPM", {}),
    "jp2": ("JPEG2000", {}),
    "avif": ("AVIF", {}),
}


def encode(name: str, image: np.ndarray = PICTURE) -> bytes:
    """Return an image as a file of a kind."""
    kind, options = KINDS[name]
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, kind, **options)
    return sink.getvalue()


def broken_images() -> dict[str, bytes]:
    """Return 100 broken images by file name."""
    images = {}
    for name in KINDS:
        data = encode(name)
        for share in (0.02, 0.3, 0.5, 0.7, 0.9):
            images[f"cut-{share}.{name}"] = data[: int(share * len(data))]
    for name in ("jpg", "optimized.jpg"):
        data = encode(name)
        for share in (0.4, 0.5, 0.6, 0.7):
            place = int(share * len(data))
            images[f"end-{share}.{name}"] = data[:place] + b"\xff\xd9"
            images[f"zeros-{share}.{name}"] = data[:place] + bytes(len(data) - place)
            images[f"hole-{share}.{name}"] = data[:place] + bytes(256) + data[place + 256 :]
    data = encode("png")
    for share in (0.2, 0.4, 0.6, 0.8):
        place = int(share * len(data))
        images[f"bit-{share}.png"] = data[:place] + bytes((data[place] ^ 4,)) + data[place + 1 :]
        images[f"zeros-{share}.png"] = data[:place] + bytes(len(data) - place)
    texts = ("", "<html>404 Not Found</html>", "version https://git-lfs.github.com/spec/v1\n", "\0")
    for number, text in enumerate(texts):
        images[f"text-{number}.jpg"] = text.encode() * (500 if text == "\0" else 1)
    data = encode("progressive.jpg")
    for share in (0.2, 0.4):
        images[f"end-{share}.progressive.jpg"] = data[: int(share * len(data))] + b"\xff\xd9"
    data = encode("jpg")
    images["marker.jpg"] = data[:-900] + b"\xff\x55" + data[-898:]
    images["lossy-as-png.png"] = encode("png")[:8] + data[8:]
    return images


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_100_broken_images_are_recorded(tmp_path: Path) -> None:
    """Each of 100 broken images is a failure with a reason; none of them has pixels."""
    images = broken_images()
    assert len(images) == 100
    assert len(set(images.values())) == 100
    for name, content in images.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)  # formats are detected by content
    source = FolderSource(tmp_path)
    assert len(source.keys) == 100
    loaded = list(load_views(source, range(100), VIEW, threads=2))
    assert [source.keys[view.index] for view in loaded if view.failure is None] == []
    assert all(view.pixels_CHW is None and not view.source for view in loaded)
    assert all(len(view.failure or "") > 3 and "0x" not in str(view.failure) for view in loaded)
    assert Counter(view.failure for view in loaded)["its pixel data end too early"] == 8


@pytest.mark.parametrize("name", KINDS)
def test_intact_images_have_no_damage(name: str) -> None:
    """Pictures, noise and single colours of every format have no damage, with or without a tail."""
    half = PICTURE.copy()
    half[40:] = 255
    noise = RNG.integers(0, 256, PICTURE.shape, np.uint8)
    for image in (PICTURE, noise, half, np.zeros_like(PICTURE), np.full_like(PICTURE, 255)):
        data = encode(name, image)
        assert damage(data) is None
        pixels, unchanged = decode_view(data, VIEW)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
        assert unchanged
        assert (pixels == expected).all()
        if name.endswith(("jpg", "png")):
            assert (decode_view(data + bytes(500), VIEW)[0] == expected).all()


def test_a_png_with_one_right_checksum_is_decoded() -> None:
    """A PNG whose chunk checksum is wrong, but whose pixels have their other one, is decoded."""
    data = bytearray(encode("png"))
    data[-13] ^= 1  # the last byte of the checksum before IEND
    assert (decode_view(bytes(data), VIEW)[0] == PICTURE.transpose(2, 0, 1)).all()


def test_cached_images_are_decoded_as_they_were() -> None:
    """An image that an older version has stored in a cache is decoded without these checks."""
    data = encode("jpg")
    cut = data[: len(data) // 2] + b"\xff\xd9"
    expected = np.asarray(Image.open(io.BytesIO(cut))).transpose(2, 0, 1)
    assert (decode_view(cut, VIEW, stored=True)[0] == expected).all()


def test_a_damaged_mask_is_refused(tmp_path: Path) -> None:
    """A mask with a changed byte is refused: the checksum of its pixels is wrong."""
    data = bytearray(encode("png", RNG.integers(0, 3, (SIDE, SIDE), np.uint8)))
    data[data.index(b"IDAT") + 100] ^= 4
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImagesError, match=r"a\.png: not a readable mask \("):
        open_masks(tmp_path).load("a.jpg", VIEW)


def test_empty_images_are_told(tmp_path: Path) -> None:
    """Images of one colour, and 12 bits in a 16-bit file, are decoded and said to show nothing."""
    images = {
        "black": np.zeros((SIDE, SIDE, 3), np.uint8),
        "grey": np.full((SIDE, SIDE, 3), 90, np.uint8),
        "white": np.full((20, 30), 255, np.uint8),
        "dark": RNG.integers(0, 4096, (SIDE, SIDE), np.uint16),
        "deep": RNG.integers(0, 65536, (SIDE, SIDE), np.uint16),
        "picture": PICTURE // 20,
    }
    for name, values in images.items():
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    source = FolderSource(tmp_path)
    loaded = load_views(source, range(len(images)), VIEW, threads=1)
    assert {source.keys[view.index]: view.emptiness for view in loaded} == {
        "black.png": "all black",
        "dark.png": "12 bits in a 16-bit file",
        "deep.png": None,
        "grey.png": "all of one colour",
        "picture.png": None,
        "white.png": "all white",
    }
