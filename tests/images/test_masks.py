"""Masks are found by key, follow the geometry of their image, and are refused with a reason."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtcache.errors import ImagesError, ImagesNotFoundError
from dtcache.images import MaskFolder, decode_view, open_masks
from dtcache.images.decode import upright_size
from dtcache.images.scenes import CLASSES, scene
from dtcache.recipe import ViewSpec
from pipelines.write_scenes import write_scenes

SQUARE = ViewSpec(height=16, width=16)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


def save(path: Path, values: np.ndarray, mode: str | None = None) -> None:
    """Write mask values as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if mode == "P":
        image = Image.fromarray(values).convert("L")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(path, "PNG")


def blobs(height: int, width: int) -> np.ndarray:
    """Return three classes in large patches, uint8 (H, W)."""
    y, x = np.mgrid[:height, :width]
    return ((y * 5 // height + 2 * (x * 4 // width)) % 3).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "view"),
    [
        ((16, 48), SQUARE),
        ((90, 61), SQUARE),
        ((61, 90), SQUARE),
        ((37, 53), ViewSpec(height=16, width=32)),
        ((37, 53), ViewSpec(height=16, width=32, resize_mode="stretch")),
        ((12, 9), SQUARE),
    ],
)
def test_a_mask_goes_through_the_geometry_of_its_image(
    tmp_path: Path, size: tuple[int, int], view: ViewSpec
) -> None:
    """A mask gets the geometry of its image, so an image painted by its mask still matches it."""
    mask = blobs(*size)
    save(tmp_path / "a.png", mask)
    data = io.BytesIO()
    Image.fromarray(COLOURS[mask]).save(data, "PNG")
    pixels, _ = decode_view(data.getvalue(), view)
    shown = MaskFolder(root=tmp_path, ignore=255, names=None).load("a.png", view, size)
    assert shown.shape == (view.height, view.width) and shown.dtype == np.uint8
    pure = pixels.max(0) > 250
    assert pure.mean() > 0.3
    assert (pixels.argmax(0) == shown)[pure].all()
    assert (pixels.argmax(0) == shown).mean() > 0.9


def test_cropping_alone_is_exact_and_the_views_own_size_is_as_stored(tmp_path: Path) -> None:
    """A mask that needs no scaling keeps its pixels exactly."""
    mask = np.random.default_rng(1).integers(0, 255, (16, 40)).astype(np.uint8)
    save(tmp_path / "a.png", mask)
    folder = open_masks(tmp_path)
    assert np.array_equal(folder.load("a.jpg", SQUARE), mask[:, 12:28])
    assert np.array_equal(folder.load("a.jpg", ViewSpec(height=16, width=40)), mask)


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("a.jpg", "a.png"),
        ("x/a.b.JPEG", "x/a.b.png"),
        ("x/0001", "x/0001.png"),
        ("v1.5", "v1.5.png"),
    ],
)
def test_a_mask_lies_at_the_images_path(tmp_path: Path, key: str, file: str) -> None:
    """A mask's path is its image's with another extension, whatever other dots the key has."""
    save(tmp_path / file, blobs(4, 4))
    folder = open_masks(tmp_path)
    assert folder.has(key) and not folder.has("other/" + key)
    assert np.array_equal(folder.load(key, ViewSpec(height=4, width=4)), blobs(4, 4))


def test_a_key_that_leads_out_of_the_folder_has_no_mask(tmp_path: Path) -> None:
    """A key with .. or an absolute path finds no mask outside the folder."""
    save(tmp_path / "a.png", blobs(4, 4))
    (tmp_path / "inner").mkdir()
    folder = open_masks(tmp_path / "inner")
    for key in ("../a.jpg", str(tmp_path / "a.jpg")):
        assert not folder.has(key)
        with pytest.raises(ImagesError, match=r"expected the mask of image .* got no such file"):
            folder.load(key, SQUARE)


def four_bit_png(values: np.ndarray) -> bytes:
    """Encode values below 16 as 4-bit greyscale PNG, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(
        b"\0" + bytes(16 * a + b for a, b in row.reshape(-1, 2).tolist()) for row in values
    )
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 4, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_every_way_to_store_class_numbers_reads_alike(tmp_path: Path) -> None:
    """Grey of 4, 8 and 16 bits, palette indices and one bit per pixel give the stored numbers."""
    mask = blobs(8, 8)
    folder = open_masks(tmp_path)
    view = ViewSpec(height=8, width=8)
    save(tmp_path / "grey.png", mask)
    save(tmp_path / "palette.png", mask, "P")
    save(tmp_path / "deep.png", mask.astype(np.uint16))
    (tmp_path / "four.png").write_bytes(four_bit_png(mask))
    for name in ("grey", "palette", "deep", "four"):
        assert np.array_equal(folder.load(name, view), mask), name
    save(tmp_path / "bits.png", mask == 1)
    assert np.array_equal(folder.load("bits", view), mask == 1)


def test_masks_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """An unusable mask gives one line with its file and the reason."""
    folder = open_masks(tmp_path)
    save(tmp_path / "colour.png", COLOURS[blobs(4, 4)])
    with pytest.raises(
        ImagesError, match=r"colour\.png: expected a mask of one channel, .* got RGB pixels"
    ):
        folder.load("colour", SQUARE)
    save(tmp_path / "deep.png", np.full((4, 4), 300, np.uint16))
    with pytest.raises(
        ImagesError, match=r"deep\.png: expected class numbers from 0 to 255, got 300"
    ):
        folder.load("deep", SQUARE)
    save(tmp_path / "cut.png", blobs(64, 64))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(ImagesError, match=r"cut\.png: not a readable mask"):
        folder.load("cut", SQUARE)
    Image.fromarray(blobs(4, 4)).save(tmp_path / "jpeg.png", "JPEG")
    with pytest.raises(ImagesError, match=r"jpeg\.png: not a readable mask"):
        folder.load("jpeg", SQUARE)
    save(tmp_path / "small.png", blobs(4, 6))
    with pytest.raises(
        ImagesError, match=r"small\.png: expected the size of image small, 8x8 pixels, got 6x4"
    ):
        folder.load("small", SQUARE, (8, 8))


def test_the_size_of_an_image_is_that_of_its_upright_view() -> None:
    """An image that EXIF rotates by a quarter has height and width swapped."""
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 10, 3), np.uint8)).save(data, "JPEG", exif=exif)
    assert upright_size(data.getvalue()) == (10, 4)
    data = io.BytesIO()
    Image.fromarray(np.zeros((4, 10, 3), np.uint8)).save(data, "PNG")
    assert upright_size(data.getvalue()) == (4, 10)


def test_classes_come_from_the_folder_and_the_caller_wins_with_ignore(tmp_path: Path) -> None:
    """classes.toml gives names and ignore index (255 without it); the caller's index wins."""
    assert open_masks(tmp_path) == MaskFolder(root=tmp_path, ignore=255, names=None)
    (tmp_path / "classes.toml").write_text('names = ["sky", "road"]\nignore = 11\n')
    assert open_masks(tmp_path) == MaskFolder(root=tmp_path, ignore=11, names=("sky", "road"))
    assert open_masks(tmp_path, 0).ignore == 0


def test_a_value_without_a_class_is_named_and_the_ignored_one_stays(tmp_path: Path) -> None:
    """A value without a class is refused with its file and the classes; ignored pixels stay."""
    (tmp_path / "classes.toml").write_text('names = ["sky", "road"]\nignore = 11\n')
    save(tmp_path / "good.png", np.array([[0, 1], [11, 0]], np.uint8))
    save(tmp_path / "bad.png", np.array([[0, 1], [2, 0]], np.uint8))
    folder = open_masks(tmp_path)
    assert folder.load("good", ViewSpec(height=2, width=2)).tolist() == [[0, 1], [11, 0]]
    with pytest.raises(
        ImagesError, match=r"bad\.png: expected the values 0 to 1 .*\(sky, road\) or 11, .*, got 2;"
    ):
        folder.load("bad", SQUARE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names = [", "not TOML"),
        ("colours = 3", "expected names and ignore, got 'colours'"),
        ("names = []", "1 to 256 distinct class names"),
        ('names = ["a", "a"]', "1 to 256 distinct class names"),
        ("names = [1, 2]", "1 to 256 distinct class names"),
        ("ignore = 256", "expected an ignore index from 0 to 255, got '256'"),
        ("ignore = true", "expected an ignore index from 0 to 255, got 'True'"),
    ],
)
def test_classes_of_another_kind_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """An invalid classes.toml is refused, with the file in the message."""
    (tmp_path / "classes.toml").write_text(text)
    with pytest.raises(ImagesError, match=rf"classes\.toml: .*{message}"):
        open_masks(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """A path that is not a folder is refused."""
    with pytest.raises(ImagesNotFoundError, match="expected a folder of masks"):
        open_masks(tmp_path / "none")


def test_scenes_come_with_masks_that_open(tmp_path: Path) -> None:
    """The masks of write_scenes open with the masks and class names of scene()."""
    write_scenes(tmp_path, seed=3, size=32, count=3)
    folder = open_masks(tmp_path / "masks")
    assert folder.names == ("background", *CLASSES)
    for index in range(3):
        item = scene(3, index, 32)
        key = f"{CLASSES[item.label]}/{index:06d}.png"
        assert np.array_equal(folder.load(key, ViewSpec(height=32, width=32), (32, 32)), item.mask)


def test_masks_in_another_unicode_form_are_told(tmp_path: Path) -> None:
    """A mask whose name has another Unicode form than its image's is found for the error."""
    (tmp_path / "caf\u00e9.png").touch()
    folder = open_masks(tmp_path)
    assert folder.form_hint(["a.jpg", "cafe\u0301.jpg"]) == (
        " (the mask of cafe\u0301.jpg has the Unicode form NFC, its image another one; rename the "
        "masks)"
    )
    assert folder.form_hint(["a.jpg", "caf\u00e9.jpg"]) == ""
