"""Malformed metadata never fail an intact image, and of EXIF only the orientation is read."""

import io
import struct
import zlib

import numpy as np
import pytest
from images.test_decode_formats import ORIENTATIONS, RNG, chunk, encode
from PIL import Image

from dtcache.images import decode_view
from dtcache.images.decode import upright_size
from dtcache.images.masks import open_masks
from dtcache.recipe import ViewSpec

SHAPE = (24, 32)
VIEW = ViewSpec(height=24, width=32)
STORED = RNG.integers(0, 256, (*SHAPE, 3), np.uint8)


def exif(orientation: int, order: str = "<", *, kind: int = 3, more: bytes = b"") -> bytes:
    """Return EXIF data with one tag, and the entry `more` after it."""
    value = struct.pack(order + ("H2x" if kind == 3 else "I"), orientation)
    entry = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    count = struct.pack(order + "H", 2 if more else 1)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", 8) + count + entry + more + bytes(4)


BROKEN_EXIF = {
    "empty": b"",
    "text": b"not a directory",
    "cut": exif(6)[:14],
    "no magic": b"XX" + exif(6)[2:],
    "far directory": b"II*\0\xff\xff\xff\x7f",
    "zero orientation": exif(0),
    "large orientation": exif(9),
}
SPOILED_EXIF = {
    "value out of bounds": struct.pack("<HHII", 0x927C, 7, 1 << 30, 1 << 30),
    "unknown type": struct.pack("<HHII", 0x010F, 99, 1, 0),
    "loop": struct.pack("<HHII", 0x8769, 4, 1, 8),
    "cut entry": b"\x69\x87\x04",
}
"""Entries after an intact orientation."""


def jpeg(*segments: tuple[int, bytes], image: np.ndarray = STORED) -> bytes:
    """Return a JPEG file with more segments after its first marker."""
    data = encode(Image.fromarray(image), "JPEG", quality=95)
    extra = b"".join(
        bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content
        for marker, content in segments
    )
    return data[:2] + extra + data[2:]


def png(*chunks: bytes, after: tuple[bytes, ...] = ()) -> bytes:
    """Return a PNG file with more chunks before its pixels, and others after them."""
    data = encode(Image.fromarray(STORED), "PNG")
    pixels = data.index(b"IDAT") - 4
    return data[:pixels] + b"".join(chunks) + data[pixels:-12] + b"".join(after) + data[-12:]


def tiff(*entries: bytes) -> bytes:
    """Return a TIFF file with more entries in its directory."""
    data = encode(Image.fromarray(STORED), "TIFF", compression="tiff_lzw")
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    old = [data[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    new = b"".join(sorted([*old, *entries], key=lambda entry: struct.unpack_from("<H", entry)))
    directory = struct.pack("<H", count + len(entries)) + new + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory


def pixels(data: bytes, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Return an image at its own size, (H, W, 3)."""
    view = ViewSpec(height=shape[0], width=shape[1])
    return decode_view(data, view)[0].transpose(1, 2, 0)


JPEG_PIXELS = np.asarray(Image.open(io.BytesIO(jpeg())))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
def test_every_orientation_is_applied(orientation: int, order: str, kind: int) -> None:
    """All eight orientations are applied, as a short or a long integer, in both byte orders."""
    data = jpeg((0xE1, b"Exif\0\0" + exif(orientation, order, kind=kind)))
    upright = ORIENTATIONS[orientation](JPEG_PIXELS)
    assert (pixels(data, upright.shape[:2]) == upright).all()
    assert upright_size(data) == upright.shape[:2]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF"])
def test_the_size_follows_the_orientation(orientation: int, kind: str) -> None:
    """The upright size that the header gives is the size of the decoded image."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = encode(Image.fromarray(STORED), kind, exif=tags)
    upright = ORIENTATIONS[orientation](STORED)
    assert upright_size(data) == upright.shape[:2]
    assert decode_view(data, ViewSpec(height=upright.shape[0], width=upright.shape[1]))[1]


@pytest.mark.parametrize("broken", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
def test_broken_exif_means_no_orientation(broken: bytes) -> None:
    """An image whose EXIF data cannot be read is decoded as it is stored, in every format."""
    assert (pixels(jpeg((0xE1, b"Exif\0\0" + broken))) == JPEG_PIXELS).all()
    assert (pixels(png(chunk(b"eXIf", broken))) == STORED).all()
    if broken:
        webp = encode(Image.fromarray(STORED), "WEBP", lossless=True, exif=b"Exif\0\0" + broken)
        assert (pixels(webp) == STORED).all()


@pytest.mark.parametrize("more", SPOILED_EXIF.values(), ids=SPOILED_EXIF)
def test_an_orientation_beside_broken_tags_is_applied(more: bytes) -> None:
    """Tags that cannot be read do not hide the orientation before them."""
    upright = ORIENTATIONS[6](JPEG_PIXELS)
    data = jpeg((0xE1, b"Exif\0\0" + exif(6, more=more)))
    assert (pixels(data, upright.shape[:2]) == upright).all()


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
@pytest.mark.parametrize(
    "segment",
    [
        (0xE2, b"ICC_PROFILE\0\x05\x02broken"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0broken"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation='x'"),
        (0xED, b"Photoshop 3.0\x008BIM\x04\x04"),
        (0xE0, b"JFIF\0"),
        (0xFE, b"\xff\xd8\xff"),
    ],
)
def test_jpeg_segments_never_fail_pixels(segment: tuple[int, bytes]) -> None:
    """A JPEG with a malformed profile, index, XMP, Photoshop block or comment is decoded."""
    assert (pixels(jpeg(segment)) == JPEG_PIXELS).all()


BAD_CHUNKS = {
    "ICC of an unknown method": chunk(b"iCCP", b"name\0\x07broken"),
    "ICC without a method": chunk(b"iCCP", b"name"),
    "text of an unknown method": chunk(b"zTXt", b"key\0\x07broken"),
    "short size": chunk(b"pHYs", b"\0"),
    "short gamma": chunk(b"gAMA", b"\0"),
    "short primaries": chunk(b"cHRM", b"\0" * 5),
    "short intent": chunk(b"sRGB", b""),
    "short animation": chunk(b"acTL", b"\0"),
    "frame out of order": chunk(b"fcTL", struct.pack(">5I", 7, 32, 24, 0, 0) + bytes(6)),
    "wrong checksum": chunk(b"tEXt", b"key\0value")[:-1] + b"\0",
    "wrong checksum of EXIF": chunk(b"eXIf", exif(6))[:-1] + b"\0",
    "XMP that is not text": chunk(b"tEXt", b"XML:com.adobe.xmp\0\xff\xfe"),
    "raw profile": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n8\nzz\n"),
    "unknown": chunk(b"zzZz", b"\0" * 9),
    "much text": b"".join(
        chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1 << 20))) for i in range(70)
    ),
}


@pytest.mark.parametrize("bad", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_png_chunks_never_fail_pixels(bad: bytes) -> None:
    """A PNG with a malformed ancillary chunk, before or after its pixels, is decoded."""
    assert (pixels(png(bad)) == STORED).all()
    if b"fcTL" not in bad and b"eXIf" not in bad:  # Pillow applies EXIF data after the pixels
        assert (pixels(png(after=(bad,))) == STORED).all()


def test_a_png_keeps_its_orientation_beside_a_bad_chunk() -> None:
    """The orientation of a PNG is applied when another chunk is malformed."""
    upright = ORIENTATIONS[8](STORED)
    data = png(chunk(b"pHYs", b"\0"), chunk(b"eXIf", exif(8)))
    assert (pixels(data, upright.shape[:2]) == upright).all()
    assert upright_size(data) == upright.shape[:2]


def test_a_png_keeps_its_transparency_beside_a_bad_chunk() -> None:
    """Palette and transparency of a PNG stay when another chunk is left out."""
    image = Image.fromarray(STORED[:, :, 0] // 64, "P")
    image.putpalette(bytes(range(12)))
    data = encode(image, "PNG", transparency=0)
    start = data.index(b"PLTE") - 4
    broken = data[:start] + chunk(b"gAMA", b"\0") + data[start:]
    assert (pixels(broken) == pixels(data)).all()
    assert (pixels(data)[STORED[:, :, 0] < 64] == 255).all()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("tag", [282, 34665, 34675, 700, 33723, 65000])
def test_tiff_tags_never_fail_pixels(tag: int) -> None:
    """A TIFF with a resolution, EXIF, profile or XMP that points nowhere is decoded."""
    entry = struct.pack("<HHII", tag, 4 if tag == 34665 else 7, 1 << 20, 1 << 30)
    assert (pixels(tiff(entry)) == STORED).all()
    looping = struct.pack("<HHII", tag, 4, 1, 8)
    assert (pixels(tiff(looping)) == STORED).all()


def test_an_avif_with_broken_exif_is_decoded() -> None:
    """An AVIF with EXIF data that cannot be read is decoded."""
    data = encode(Image.fromarray(STORED), "AVIF", quality=100, subsampling="4:4:4")
    tags = Image.Exif()
    tags[0x0110] = "a camera"
    tagged = encode(
        Image.fromarray(STORED), "AVIF", quality=100, subsampling="4:4:4", exif=tags.tobytes()
    )
    start = tagged.index(tags.tobytes()[6:14])
    broken = tagged[:start] + b"XX" + tagged[start + 2 :]
    assert (pixels(broken) == pixels(data)).all()


def test_masks_with_bad_chunks_are_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A mask with a malformed chunk has its class numbers."""
    values = RNG.integers(0, 3, SHAPE, np.uint8)
    data = encode(Image.fromarray(values), "PNG")
    start = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:start] + chunk(b"pHYs", b"\0") + data[start:])
    assert (open_masks(tmp_path).load("a.jpg", VIEW) == values).all()
