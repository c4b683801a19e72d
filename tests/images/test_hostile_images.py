"""Seeded random changes of image files, masks, tar and Parquet files: read, or refused by name."""

import io
import json
import tarfile
import warnings
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.fuzz.files import mutate_bytes
from support.fuzz.json_values import mutate_json
from support.fuzz.tables import mutate_table
from support.fuzz.toml_values import toml_bytes

from dtcache.errors import BadImageError, DtcacheError, ImagesError
from dtcache.images import decode_view, open_masks, open_source
from dtcache.recipe import ViewSpec

VIEW = ViewSpec(height=8, width=8)
INPUTS = 100
"""Inputs per test."""
HEADER_FIELDS = ((0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155))
"""Offset and size of fields of a tar header."""


def encoded(kind: str) -> bytes:
    """Return an image of noise as a file."""
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(noise).save(sink, kind)
    return sink.getvalue()


def read_all(path: Path) -> bool:
    """Read every image of a source, its labels and its survey; False if the source is refused."""
    try:
        source = open_source(path)
    except DtcacheError as error:
        assert str(path.name) in str(error)
        return False
    assert source.survey.summary
    assert source.labels is None or len(source.labels) == len(source.keys)
    for index in range(len(source.keys)):
        try:
            pixels, _ = decode_view(source.read(index), VIEW)
        except (BadImageError, OSError):
            continue
        assert pixels.shape == (3, 8, 8)
    return True


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM"])
def test_changed_image_files_decode_or_are_refused(kind: str) -> None:
    """Decoding returns the view's shape or raises BadImageError, and nothing else."""
    intact = encoded(kind)
    refused = 0
    for number in range(INPUTS):
        content, _ = mutate_bytes(intact, Random(number))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert decode_view(content, VIEW)[0].shape == (3, 8, 8)
            except BadImageError as error:
                assert str(error)
                refused += 1
    assert 0 < refused < INPUTS


def test_changed_masks_are_read_or_refused(tmp_path: Path) -> None:
    """A changed mask or classes.toml gives values of the view's size or an ImagesError."""
    sink = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4).save(sink, "PNG")
    classes = {"names": ["a", "b", "c", "d"], "ignore": 255}
    refused = 0
    for number in range(INPUTS):
        rng = Random(number)
        mask = sink.getvalue()
        table = toml_bytes(classes)
        if rng.random() < 0.5:
            mask, _ = mutate_bytes(mask, rng)
        else:
            changed, _ = mutate_json(json.loads(json.dumps(classes)), rng)
            try:
                table = toml_bytes(changed)
            except (RecursionError, ValueError):  # too deep, or a list that holds itself
                continue
        (tmp_path / "key.png").write_bytes(mask)
        (tmp_path / "classes.toml").write_bytes(table)
        try:
            values = open_masks(tmp_path).load("key", VIEW, (8, 8))
            assert values.shape == (8, 8) and values.dtype == np.uint8
        except ImagesError as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert INPUTS / 5 < refused < INPUTS


def test_changed_tars_are_read_or_refused(tmp_path: Path) -> None:
    """Changed bytes, and changed fields of headers under right checksums."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number in range(4):
            for name, content in (("png", encoded("PNG")), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"folder/{number}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    intact = sink.getvalue()
    headers = [at for at in range(0, len(intact), 512) if intact[at + 257 : at + 262] == b"ustar"]
    outcomes = set()
    for number in range(INPUTS):
        rng = Random(number)
        if rng.random() < 0.4:
            content, _ = mutate_bytes(intact, rng)
        else:
            changed = bytearray(intact)
            header = rng.choice(headers)
            offset, size = rng.choice(HEADER_FIELDS)
            place = header + offset + rng.randrange(size)
            changed[place] = rng.choice((0, 255, 128, 32, ord("7"), ord("/"), rng.randrange(256)))
            changed[header + 148 : header + 156] = b" " * 8
            checksum = b"%06o\0 " % sum(changed[header : header + 512])
            changed[header + 148 : header + 156] = checksum
            content = bytes(changed)
        (tmp_path / "x.tar").write_bytes(content)
        outcomes.add(read_all(tmp_path / "x.tar"))
    assert outcomes == {False, True}


def test_changed_parquet_files_are_read_or_refused(tmp_path: Path) -> None:
    """Changed bytes, and changed columns: types, names, nulls, text that is not UTF-8."""
    layout = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": encoded("PNG"), "path": f"{number}.png"} for number in range(4)]
    table = pa.table({"image": pa.array(images, layout), "label": [0, 1, 0, 1]})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    outcomes = set()
    for number in range(2 * INPUTS):
        rng = Random(number)
        if rng.random() < 0.4:
            (tmp_path / "x.parquet").write_bytes(mutate_bytes(sink.getvalue(), rng)[0])
        else:
            changed, note = mutate_table(table, rng)
            if "expands" in note:  # its reading takes 100 GB
                continue
            try:
                pq.write_table(changed, tmp_path / "x.parquet")
            except (pa.ArrowException, ValueError):
                continue
        outcomes.add(read_all(tmp_path / "x.parquet"))
    assert outcomes == {False, True}
