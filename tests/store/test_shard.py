"""One shard's bytes agree with zarr-python, and every flipped byte is detected."""

import struct
from pathlib import Path

import numpy as np
import pytest
import zarr
from google_crc32c import value as crc32c
from numcodecs.zstd import compress
from store.builders import write_nodes

from dtcache.errors import CacheDamagedError
from dtcache.store.layout import PayloadArray
from dtcache.store.shard import (
    ABSENT,
    build_shard,
    index_bytes,
    max_chunk_bytes,
    parse_index,
    unpack_chunk,
)
from dtcache.store.tag import TAG_BYTES

LENGTH = 48
MOST = LENGTH - TAG_BYTES


def array_of(entries: int) -> PayloadArray:
    """Return an array whose shards have `entries` chunks."""
    return payload_array((entries, LENGTH), entries)


def payload_array(shape: tuple[int, ...], shard_rows: int, name: str = "t1") -> PayloadArray:
    """Return an array of a cache."""
    return PayloadArray(name=name, fingerprint="f" * 64, shape=shape, shard_rows=shard_rows)


def random_payloads(count: int, seed: int) -> list[bytes]:
    """Return contents of every size from empty to full length."""
    rng = np.random.default_rng(seed)
    payloads = [rng.bytes(int(rng.integers(1, MOST + 1))) for _ in range(count)]
    payloads[0], payloads[-1] = b"", rng.bytes(MOST)
    return payloads


def stored(array: PayloadArray, payloads: list[bytes]) -> list[bytes]:
    """Return whole payloads: contents with their tags, by docs/format.md, and padding."""
    whole = []
    for i, content in enumerate(payloads):
        row, view = divmod(i, array.payloads_per_row)
        text = array.fingerprint.encode() + array.name.encode() + struct.pack("<QI", row, view)
        tag = struct.pack("<I", crc32c(text + content.rstrip(b"\0"))) if content else b""
        whole.append((tag + content).ljust(array.length, b"\0"))
    return whole


def read_all(shard: bytes, count: int, entries: int) -> list[bytes]:
    """Read the first `count` payloads of a shard with dtcache's own functions."""
    found = []
    index = parse_index(shard[-index_bytes(entries) :], array_of(entries), len(shard))
    for offset, size in index[:count].tolist():
        if offset == int(ABSENT):
            raise CacheDamagedError("absent")
        out = np.full(LENGTH, 0xAA, np.uint8)
        unpack_chunk(shard[offset : offset + size], out)
        found.append(out.tobytes())
    return found


def with_index(chunks: bytes, entries: list[tuple[int, int]]) -> bytes:
    """Return a shard of `chunks` whose index has a valid checksum and the given `entries`."""
    table = np.array(entries, "<u8").tobytes()
    return chunks + table + crc32c(table).to_bytes(4, "little")


@pytest.mark.parametrize(("rows", "views"), [(10, (2,)), (8, (2,)), (3, (1,)), (9, ())])
def test_zarr_reads_what_build_shard_wrote(
    tmp_path: Path, rows: int, views: tuple[int, ...]
) -> None:
    """zarr-python reads the same payloads, in ragged last shards and all-zero chunks too."""
    array = payload_array((rows, *views, LENGTH), 4)
    payloads = random_payloads(rows * array.payloads_per_row, seed=rows)
    write_nodes(tmp_path, array)
    for shard in range(array.num_shards):
        part = array.rows_of(shard)
        mine = payloads[part.start * array.payloads_per_row : part.stop * array.payloads_per_row]
        path = tmp_path / array.object_path(shard)
        path.write_bytes(build_shard(array, shard, mine))
    found = zarr.open_array(tmp_path / "data.zarr", path=array.name, mode="r")
    wanted = np.frombuffer(b"".join(stored(array, payloads)), np.uint8).reshape(array.shape)
    np.testing.assert_array_equal(found[...], wanted)
    np.testing.assert_array_equal(found[rows - 1], wanted[rows - 1])


def test_a_shard_that_zarr_wrote_reads(tmp_path: Path) -> None:
    """dtcache reads a shard that zarr-python wrote, so the layout is the standard one."""
    array = payload_array((4, 2, LENGTH), 4)
    write_nodes(tmp_path, array)
    payloads = [bytes([1 + i]) * (5 * i + 1) for i in range(8)]
    wanted = [p.ljust(LENGTH, b"\0") for p in payloads]
    node = zarr.open_array(tmp_path / "data.zarr", path=array.name, mode="r+")
    node[...] = np.frombuffer(b"".join(wanted), np.uint8).reshape(4, 2, LENGTH)
    assert read_all((tmp_path / array.object_path(0)).read_bytes(), 8, 8) == wanted


def test_every_flipped_byte_is_found() -> None:
    """A flipped byte anywhere in a ragged shard raises CacheDamagedError."""
    payloads = random_payloads(6, seed=1)
    shard = build_shard(array_of(8), 0, payloads)
    assert read_all(shard, 6, 8) == stored(array_of(8), payloads)
    for place in range(len(shard)):
        for mask in (0x01, 0x10, 0x80, 0xFF):
            damaged = bytearray(shard)
            damaged[place] ^= mask
            with pytest.raises(
                CacheDamagedError, match=r"^the (shard's index is damaged|checksum does not match)"
            ):
                read_all(bytes(damaged), 6, 8)


def test_every_truncation_is_found() -> None:
    """A shard truncated at any length raises CacheDamagedError."""
    shard = build_shard(array_of(8), 0, random_payloads(6, seed=2))
    for size in range(len(shard)):
        with pytest.raises(CacheDamagedError, match=r"^the shard's index is damaged"):
            read_all(shard[:size], 6, 8)


@pytest.mark.parametrize(
    "entry", [(0, 1000), (1000, 8), (40, 1), (2**64 - 10, 20), (8, 2**64 - 1), (2**63, 2**63)]
)
def test_an_index_that_points_outside_raises(entry: tuple[int, int]) -> None:
    """An index entry outside the shard's chunks raises, even if offset + size exceeds 2^64."""
    shard = with_index(b"x" * 40, [(0, 8), entry])
    with pytest.raises(CacheDamagedError, match=r"^the shard's index points outside the file"):
        parse_index(shard[-index_bytes(2) :], array_of(2), len(shard))


@pytest.mark.parametrize("entries", [[(0, 8), (7, 8)], [(8, 32), (0, 9)], [(4, 8), (4, 8)]])
def test_an_index_of_overlapping_chunks_raises(entries: list[tuple[int, int]]) -> None:
    """Chunks that share bytes are refused: a small file would stand for any amount of memory."""
    shard = with_index(b"x" * 40, entries)
    with pytest.raises(CacheDamagedError, match=r"^the shard's index has chunks that overlap"):
        parse_index(shard[-index_bytes(2) :], array_of(2), len(shard))


def test_an_index_of_a_chunk_beyond_any_payload_raises() -> None:
    """A chunk that is larger than any encoding of its payload is refused before it is read."""
    most = max_chunk_bytes(LENGTH)
    shard = with_index(bytes(most), [(0, most), (most, 0)])
    parse_index(shard[-index_bytes(2) :], array_of(2), len(shard))
    shard = with_index(bytes(most + 1), [(0, most + 1), (most + 1, 0)])
    with pytest.raises(CacheDamagedError, match=rf"has a chunk of {most + 1} bytes for a payload"):
        parse_index(shard[-index_bytes(2) :], array_of(2), len(shard))


@pytest.mark.parametrize("size", [0, 8, LENGTH - 1, LENGTH + 1, 4 * LENGTH])
def test_a_chunk_of_another_length_raises(size: int) -> None:
    """A chunk that decompresses to another length than the array's raises."""
    packed = compress(b"\x05" * size, 1)
    chunk = packed + crc32c(packed).to_bytes(4, "little")
    with pytest.raises(
        CacheDamagedError, match=rf"^it decompresses to \d+ bytes instead of {LENGTH}"
    ):
        unpack_chunk(chunk, np.full(LENGTH, 0xAA, np.uint8))


def test_a_chunk_that_is_no_zstd_raises() -> None:
    """A chunk with a valid checksum that is not a zstd frame raises CacheDamagedError."""
    for packed in (b"", b"\x01", b"not zstd at all", compress(b"y" * LENGTH, 1)[:-2]):
        chunk = packed + crc32c(packed).to_bytes(4, "little")
        with pytest.raises(
            CacheDamagedError, match=r"^(it (does not )?decompress|the checksum does not)"
        ):
            unpack_chunk(chunk, np.zeros(LENGTH, np.uint8))


def test_array_layout() -> None:
    """Shards cover all rows once, and their file names have one zero per inner axis."""
    array = payload_array((10, 2, 48), 4)
    assert [list(array.rows_of(s)) for s in range(array.num_shards)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert (array.length, array.payloads_per_row) == (48, 2)
    assert array.object_path(2) == "data.zarr/t1/c.2.0.0"
    assert payload_array((10, 48), 4, "images").object_path(1) == "data.zarr/images/c.1.0"
