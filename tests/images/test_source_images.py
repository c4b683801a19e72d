"""Images that a cache does not hold come from their source, if they are unchanged."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dtcache.errors import ImagesError
from dtcache.images import LinkedImages, decode_view
from dtcache.recipe import ViewSpec

VIEW = ViewSpec(height=8, width=12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of three images of 20 px."""
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def link(folder: Path, keys: list[str], hashes: list[bytes | None]) -> LinkedImages:
    """Link rows to a folder, from columns as samples.parquet has them."""
    return LinkedImages(
        folder,
        pa.chunked_array([keys], pa.string()),
        pa.chunked_array([hashes], pa.binary(32)),
        VIEW,
    )


def linked(folder: Path) -> LinkedImages:
    """Link rows in another order than the source's; row 1 failed."""
    keys = ["2.png", "gone.png", "0.png"]
    hashes = [
        hashlib.sha256((folder / k).read_bytes()).digest() if k != "gone.png" else None
        for k in keys
    ]
    return link(folder, keys, hashes)


def test_rows_find_their_images_by_key(folder: Path) -> None:
    """A row's pixels are the view of the image with its key, whatever the source's order."""
    for row, key in ((0, "2.png"), (2, "0.png")):
        np.testing.assert_array_equal(
            linked(folder).pixels(row), decode_view((folder / key).read_bytes(), VIEW)[0]
        )


def test_a_missing_image_is_named(folder: Path) -> None:
    """A source that lacks images of the cache is refused at once, with their number and one key."""
    with pytest.raises(
        ImagesError, match=r"1 of 2 images of the cache are missing, such as x\.png"
    ):
        link(folder, ["0.png", "x.png"], [b"a" * 32, b"b" * 32])


def test_a_changed_image_is_refused(folder: Path) -> None:
    """An image with the right name but other bytes is refused."""
    images = linked(folder)
    sink = io.BytesIO()
    Image.new("RGB", (20, 20)).save(sink, "PNG")
    (folder / "2.png").write_bytes(sink.getvalue())
    with pytest.raises(
        ImagesError, match=r"2\.png is not the image that the cache was extracted from \(SHA-256"
    ):
        images.pixels(0)


def test_an_image_that_went_away_is_named(folder: Path) -> None:
    """An image that is deleted after the start gives one error with its name."""
    images = linked(folder)
    (folder / "0.png").unlink()
    with pytest.raises(
        ImagesError, match=r"0\.png: .*No such file.* the extraction read this image"
    ):
        images.pixels(2)


@pytest.mark.parametrize("kind", ["tar", "parquet", "parquet in windows"])
def test_images_come_from_every_kind_of_source(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows find their images in tars and in Parquet, held in memory or not."""
    contents = {name: (folder / f"{name}.png").read_bytes() for name in ("0", "1", "2")}
    path = tmp_path / f"a.{kind.split()[0]}"
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for name in contents:
                tar.add(folder / f"{name}.png", f"{name}.png")
    else:
        rows = [{"bytes": data, "path": name} for name, data in contents.items()]
        image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        pq.write_table(pa.table({"image": image}), path)
    if kind == "parquet in windows":
        monkeypatch.setattr("dtcache.images.parquet.default_held_bytes", lambda: 100)
    images = link(
        path, ["2", "0"], [hashlib.sha256(contents[name]).digest() for name in ("2", "0")]
    )
    for row, name in enumerate(("2", "0")):
        np.testing.assert_array_equal(images.pixels(row), decode_view(contents[name], VIEW)[0])


def test_names_in_another_unicode_form_are_told(folder: Path) -> None:
    """If images are missing only because of the Unicode form of their names, the error says so."""
    (folder / "0.png").rename(folder / "caf\u00e9.png")
    with pytest.raises(
        ImagesError, match=r"such as cafe\u0301\.png \(they have this name in another Unicode form"
    ):
        link(folder, ["1.png", "cafe\u0301.png"], [b"a" * 32, b"b" * 32])
