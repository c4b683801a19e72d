"""Every pixel format decodes as NumPy computes it, and unsupported formats are refused."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dtcache.errors import BadImageError
from dtcache.images import LoadedView, decode_view
from dtcache.images.stored_images import decode_stored, encode_stored, image_bound
from dtcache.recipe import ViewSpec

RNG = np.random.default_rng(0)
VIEW = ViewSpec(height=12, width=16)
SHAPE = (12, 16)
COLOURS = {"L": 0, "RGB": 2, "LA": 4, "RGBA": 6}


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image file."""
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(
    mode: str, values: np.ndarray, *extra: bytes, size: tuple[int, int] | None = None
) -> bytes:
    """Return a PNG with 16 bits per channel, which Pillow cannot write."""
    height, width = size or values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, COLOURS[mode], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = (
        chunk(b"IHDR", header)
        + b"".join(extra)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def pixels(data: bytes) -> np.ndarray:
    """Return the view of an image at the image's own size, (H, W, 3)."""
    return decode_view(data, VIEW)[0].transpose(1, 2, 0)


def noise(*channels: int) -> np.ndarray:
    """Return random uint8 values of the view's size."""
    return RNG.integers(0, 256, (*SHAPE, *channels), np.uint8)


ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: np.rot90,
}
"""What a viewer does with the stored pixels, by the EXIF standard's number."""


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    """All eight EXIF orientations are decoded upright."""
    upright = ORIENTATIONS[orientation](stored := noise(3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(stored), kind, exif=exif, **options)
    view = ViewSpec(height=upright.shape[0], width=upright.shape[1])
    assert (decode_view(data, view)[0].transpose(1, 2, 0) == upright).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    """CMYK becomes (255 - c)(255 - k) / 255, also in JPEGs that store inverted ink values."""
    inks = np.broadcast_to(np.array([200, 20, 90, 40], np.uint8), (*SHAPE, 4))
    data = encode(
        Image.fromarray(inks, "CMYK"), kind, **({"quality": 100} if kind == "JPEG" else {})
    )
    assert kind == "TIFF" or b"Adobe" in data
    wanted = (255.0 - inks[:, :, :3]) * (255.0 - inks[:, :, 3:]) / 255
    assert np.abs(pixels(data) - wanted).max() <= (3 if kind == "JPEG" else 1)


def test_palettes_are_looked_up() -> None:
    """A pixel of a palette image has the colour of its palette entry."""
    colours = RNG.integers(0, 256, (256, 3), np.uint8)
    places = noise()
    image = Image.fromarray(places, "P")
    image.putpalette(colours.tobytes())
    for kind in ("PNG", "GIF", "BMP"):
        assert (pixels(encode(image, kind)) == colours[places]).all()


@pytest.mark.parametrize(("colours", "index"), [(2, 2), (2, 200), (0, 0)])
def test_an_index_beyond_the_palette_is_damage(colours: int, index: int) -> None:
    """A pixel without a colour is never decoded as black; a palette that is missing has none."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 3, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(range(3 * colours))) if colours else b""
    rows = chunk(b"IDAT", zlib.compress(bytes([0, 0, index]))) + chunk(b"IEND", b"")
    reason = f"palette index {index}, but its palette has {colours} colours"
    with pytest.raises(BadImageError, match=reason):
        pixels(b"\x89PNG\r\n\x1a\n" + header + palette + rows)


def test_transparent_palette_entries_are_white() -> None:
    """A transparent palette entry shows the white background instead of its own colour."""
    colours = RNG.integers(0, 256, (256, 3), np.uint8)
    places = noise()
    image = Image.fromarray(places, "P")
    image.putpalette(colours.tobytes())
    wanted = np.where(places[:, :, None] == places[0, 0], 255, colours[places])
    assert (pixels(encode(image, "PNG", transparency=int(places[0, 0]))) == wanted).all()
    alphas = bytes(RNG.integers(0, 256, 256, np.uint8))
    share = np.frombuffer(alphas, np.uint8)[places][:, :, None] / 255
    blended = share * colours[places] + (1 - share) * 255
    assert np.abs(pixels(encode(image, "PNG", transparency=alphas)) - blended).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("bits", [8, 16])
def test_alpha_is_blended_with_white(mode: str, bits: int) -> None:
    """Alpha compositing gives alpha x colour + (1 - alpha) x 255, at 8 and 16 bits per channel."""
    values = noise(len(mode))
    data = (
        encode(Image.fromarray(values, mode), "PNG")
        if bits == 8
        else png16(mode, values.astype(np.uint16) << 8)
    )
    colour = values[:, :, :-1].astype(float)
    alpha = values[:, :, -1:] / 255
    wanted = np.broadcast_to(alpha * colour + (1 - alpha) * 255, (*SHAPE, 3))
    assert np.abs(pixels(data) - wanted).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_alpha_changes_nothing(mode: str) -> None:
    """With alpha 255 throughout, the colours stay exact and the file itself can be stored."""
    values = noise(len(mode))
    values[:, :, -1] = 255
    view, unchanged = decode_view(encode(Image.fromarray(values, mode), "PNG"), VIEW)
    assert unchanged
    assert (view.transpose(1, 2, 0) == np.broadcast_to(values[:, :, :-1], (*SHAPE, 3))).all()


def test_blended_images_are_stored_as_they_were_seen() -> None:
    """A transparent image is stored as its blended view, and older caches with the file decode.

    Other readers would decode the file itself to other pixels.
    """
    data = encode(Image.fromarray(values := noise(4), "RGBA"), "PNG")
    view, unchanged = decode_view(data, VIEW)
    assert not unchanged
    loaded = LoadedView(index=0, pixels_CHW=view, source=data, unchanged=unchanged, failure=None)
    stored = encode_stored(loaded, image_bound(VIEW))
    assert (
        np.asarray(Image.open(io.BytesIO(stored[4:])).convert("RGB")) == view.transpose(1, 2, 0)
    ).all()
    older = np.frombuffer(len(data).to_bytes(4, "little") + data, np.uint8)
    assert (decode_stored(older, VIEW).transpose(1, 2, 0) == values[:, :, :3]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind: str) -> None:
    """A 16-bit grey value keeps its upper 8 bits."""
    values = RNG.integers(0, 65536, SHAPE, np.uint16)
    assert (pixels(encode(Image.fromarray(values), kind)) == (values >> 8)[:, :, None]).all()


def test_16_bit_colour_is_scaled() -> None:
    """A 16-bit colour value keeps its upper 8 bits per channel."""
    values = RNG.integers(0, 65536, (*SHAPE, 3), np.uint16)
    assert (pixels(png16("RGB", values)) == values >> 8).all()


def test_greys_and_bits() -> None:
    """Grey has equal channels; in one-bit images 0 is black and 1 is white."""
    grey = noise()
    assert (pixels(encode(Image.fromarray(grey), "PNG")) == grey[:, :, None]).all()
    for kind in ("PNG", "TIFF", "BMP"):
        bits = encode(Image.fromarray(grey > 127), kind)
        assert (pixels(bits) == np.where(grey > 127, 255, 0)[:, :, None]).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_taken(kind: str) -> None:
    """An animation is decoded as its first frame, and a document as its first page."""
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_wide_values_within_8_bits_are_taken(dtype: type) -> None:
    """Floats and 32-bit integers from 0 to 255 are decoded as grey levels."""
    values = noise().astype(dtype)
    assert (
        pixels(encode(Image.fromarray(values), "TIFF")) == values.astype(np.uint8)[:, :, None]
    ).all()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            np.linspace(0, 1, 192, dtype=np.float32),
            "floating-point pixels from 0 to 1, expected 0 to 255",
        ),
        (
            np.linspace(-1, 200, 192, dtype=np.float32),
            "floating-point pixels from -1 to 200, expected 0 to 255",
        ),
        (
            np.full(192, np.nan, np.float32),
            "floating-point pixels from nan to nan, expected 0 to 255",
        ),
        (np.arange(192, dtype=np.int32) * 400, "32-bit pixels from 0 to 76400, expected 0 to 255"),
    ],
)
def test_values_of_unknown_range_are_refused(values: np.ndarray, reason: str) -> None:
    """Values of unknown range are refused, because clipping would make them black or white."""
    with pytest.raises(BadImageError, match=f"{reason}: convert it to 8 or 16 bits"):
        pixels(encode(Image.fromarray(values.reshape(SHAPE)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_files_that_were_cut_off_are_failures(kind: str, share: float) -> None:
    """A truncated image is a failure."""
    data = encode(Image.fromarray(noise(3)), kind)
    with pytest.raises(BadImageError) as caught:
        pixels(data[: int(share * len(data))])
    assert len(str(caught.value)) > 3


def test_formats_that_run_programs_are_not_decoded() -> None:
    """PostScript with an image's extension is never executed."""
    with pytest.raises(BadImageError, match="cannot identify image file"):
        pixels(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((50_000, 50_000), "decompression bomb"),
        ((9_500, 9_500), "9500x9500 pixels, over the limit of 89478485"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_dimensions_are_refused_before_decoding(size: tuple[int, int], reason: str) -> None:
    """A small header that claims a huge picture is refused before memory is allocated."""
    with pytest.raises(BadImageError, match=reason):
        pixels(png16("L", np.zeros((1, 1)), size=size))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_bombs_are_not_inflated(kind: bytes) -> None:
    """Text or a colour profile that decompresses a thousandfold is skipped, and pixels decode."""
    swollen = zlib.compress(bytes(64 << 20), 9)
    head = b"k\0\1\0\0\0" if kind == b"iTXt" else b"k\0\0"
    values = RNG.integers(0, 65536, SHAPE, np.uint16)
    tracemalloc.start()
    try:
        decoded = pixels(png16("L", values, chunk(kind, head + swollen)))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (decoded == (values >> 8)[:, :, None]).all()
    assert most < 16 << 20


def test_plain_text_beside_the_pixels_is_ignored() -> None:
    """Comments of ordinary size do not change the pixels."""
    info = PngInfo()
    info.add_text("comment", "taken in spring", zip=True)
    image = Image.fromarray(values := noise(3))
    assert (pixels(encode(image, "PNG", pnginfo=info)) == values).all()
