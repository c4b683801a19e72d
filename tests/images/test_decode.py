"""The view of an image: its geometry, its decoding, and failures that are recorded."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtcache.errors import BadImageError
from dtcache.images import FolderSource, decode_view, load_views
from dtcache.images.stored_images import decode_stored, encode_stored, image_bound
from dtcache.recipe import ViewSpec

RNG = np.random.default_rng(0)
SQUARE = ViewSpec(height=16, width=16)


def png(pixels: np.ndarray, **options: object) -> bytes:
    """Return pixels encoded as PNG."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", **options)
    return sink.getvalue()


def noise(*shape: int) -> np.ndarray:
    """Return random uint8 pixels."""
    return RNG.integers(0, 256, shape, np.uint8)


def test_an_image_of_the_views_size_is_unchanged() -> None:
    """An image of the view's size keeps its pixels exactly, channels first."""
    pixels = noise(16, 16, 3)
    view, unchanged = decode_view(png(pixels), SQUARE)
    assert unchanged
    assert (view == pixels.transpose(2, 0, 1)).all()


def test_crop_resizes_the_shorter_side_and_takes_the_centre() -> None:
    """A 16x48 image keeps its middle third, exactly, when no scaling is needed."""
    pixels = noise(16, 48, 3)
    view, unchanged = decode_view(png(pixels), SQUARE)
    assert not unchanged
    assert (view == pixels[:, 16:32].transpose(2, 0, 1)).all()


def test_crop_antialiases() -> None:
    """Shrinking a fine checkerboard leaves at most a tenth of its contrast, without aliasing."""
    board = np.indices((128, 128)).sum(0) % 2 * 255
    view, _ = decode_view(png(np.repeat(board[:, :, None], 3, 2).astype(np.uint8)), SQUARE)
    assert view.std() < 25


def test_stretch_keeps_the_whole_image() -> None:
    """Stretching keeps both ends of a wide gradient, and cropping does not."""
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (16, 1, 3))
    stretched, _ = decode_view(png(ramp), ViewSpec(height=16, width=32, resize_mode="stretch"))
    cropped, _ = decode_view(png(ramp), SQUARE)
    assert stretched.shape == (3, 16, 32)
    assert stretched.min() < 8 and stretched.max() > 247
    assert cropped.min() > 80 and cropped.max() < 175


def test_exif_orientation_is_applied() -> None:
    """A rotated photo is decoded upright, and its file is not stored as the view."""
    pixels = noise(16, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    view, _ = decode_view(png(pixels, exif=exif), SQUARE)
    assert (view == np.rot90(pixels, -1).transpose(2, 0, 1)).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image", "cannot identify image file"),
        (png(noise(16, 16, 3))[:60], "."),
    ],
    ids=["zero bytes", "text", "truncated"],
)
def test_bad_bytes_raise_with_a_reason(data: bytes, reason: str) -> None:
    """Unreadable images raise BadImageError, whose text holds no memory address."""
    with pytest.raises(BadImageError, match=reason) as caught:
        decode_view(data, SQUARE)
    assert "0x" not in str(caught.value)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of absurd size fail without using memory."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImageError, match="decompression bomb"):
        decode_view(png(noise(16, 16, 3)), SQUARE)


@pytest.mark.parametrize("size", [16, 20], ids=["source bytes", "encoded anew"])
def test_stored_images_decode_to_exactly_the_view(tmp_path: Path, size: int) -> None:
    """A cached image decodes to the teacher's pixels, bit for bit, from a padded payload."""
    (tmp_path / "a.png").write_bytes(png(noise(size, size, 3)))
    loaded = next(load_views(FolderSource(tmp_path), [0], SQUARE, threads=1))
    bound = image_bound(SQUARE)
    payload = np.frombuffer(encode_stored(loaded, bound).ljust(bound, b"\0"), np.uint8)
    assert len(payload) == bound
    assert (loaded.source in payload.tobytes()) == (size == 16)
    assert (decode_stored(payload, SQUARE) == loaded.pixels_CHW).all()


def test_an_oversized_source_is_encoded_anew(tmp_path: Path) -> None:
    """An image with too much metadata is encoded again without it, and its pixels are the same."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("junk", "".join(map(chr, RNG.integers(33, 120, 5000))))
    (tmp_path / "a.png").write_bytes(png(noise(16, 16, 3), pnginfo=info))
    loaded = next(load_views(FolderSource(tmp_path), [0], SQUARE, threads=1))
    stored = encode_stored(loaded, image_bound(SQUARE))
    assert len(stored) <= image_bound(SQUARE) < len(loaded.source)
    assert (decode_stored(np.frombuffer(stored, np.uint8), SQUARE) == loaded.pixels_CHW).all()


@pytest.mark.parametrize("length", [0, 10_000])
def test_a_stored_image_of_impossible_length_is_refused(length: int) -> None:
    """A stored image that claims more bytes than its payload is refused."""
    payload = np.frombuffer(length.to_bytes(4, "little") + bytes(96), np.uint8)
    with pytest.raises(
        BadImageError,
        match=f"a stored image of {length} bytes does not fit into its payload of 100",
    ):
        decode_stored(payload, SQUARE)


def test_a_stored_image_of_another_size_is_refused_undecoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stored PNG of 88 megapixels, in 88 kB, is refused by its header."""
    sink = io.BytesIO()
    Image.new("1", (11_000, 8_000)).save(sink, "PNG")
    data = sink.getvalue()
    monkeypatch.setattr(Image.Image, "load", None)
    payload = np.frombuffer(len(data).to_bytes(4, "little") + data, np.uint8)
    with pytest.raises(BadImageError, match="has 8000x11000 pixels, not the view's size, 16x16"):
        decode_stored(payload, SQUARE)
