"""Our zstd frames suit other decoders, and the read kernel agrees with the general decoder."""

import os
from pathlib import Path

import numpy as np
import pytest
from google_crc32c import value as crc32c
from numcodecs.zstd import compress, decompress
from zstandard import ZstdDecompressor, get_frame_parameters

from dtcache.store.shard import unpack_chunk
from dtcache.store.tag import TAG_BYTES, tag_seed, tagged, untagged
from dtcache.store.zstd_frame import BLOCK_HEADER, MAX_BLOCK, frame_header, pack_frame

SEED = tag_seed("f" * 64, "t150")
ROW = 70_000
VIEW = 3
LENGTHS = [1, 16, 255, 256, 1000, 65_791, 65_792, MAX_BLOCK, MAX_BLOCK + 16, 3 * MAX_BLOCK + 5]


def payload_sizes(length: int) -> list[int]:
    """Return sizes at every border of a frame's blocks."""
    return sorted(
        {0, 1, length // 2, length - 1, length, *(min(length, k * MAX_BLOCK) for k in (1, 2, 3))}
        - {-1}
    )


def random_payload(size: int) -> bytes:
    """Return incompressible bytes."""
    return np.random.default_rng(size).bytes(size)


def tagged_payload(size: int) -> bytes:
    """Return a payload of (ROW, VIEW) of `size` bytes with its tag, or an empty one."""
    return tagged(SEED, ROW, VIEW, random_payload(max(0, size - TAG_BYTES)))


def checked(packed: bytes) -> bytes:
    """Return a chunk: a frame and its checksum."""
    return packed + crc32c(packed).to_bytes(4, "little")


@pytest.mark.parametrize("length", LENGTHS)
def test_other_decoders_read_the_frames(length: int) -> None:
    """zstandard and numcodecs return the padded payload at every border of header and blocks."""
    for size in payload_sizes(length):
        payload = random_payload(size)
        packed = pack_frame(payload, length)
        assert get_frame_parameters(packed).content_size == length
        assert (
            ZstdDecompressor().decompress(packed)
            == decompress(packed)
            == payload.ljust(length, b"\0")
        )


def test_frames_are_no_larger_than_a_compressors() -> None:
    """A frame of random bytes is at most 20 bytes larger than them, and no larger than zstd-1's."""
    for size in (16, 300, 3000, 100_000):
        payload = random_payload(size)
        packed = pack_frame(payload, 10 * size)
        assert len(packed) <= size + 13 + 4 * (10 * size // MAX_BLOCK + 2)
        assert len(packed) <= 1.001 * len(compress(payload.ljust(10 * size, b"\0"), 1))


def test_what_compresses_is_compressed() -> None:
    """A payload is compressed only if that saves over a sixteenth."""
    text = b"features of a teacher; " * 100
    assert len(pack_frame(text, 4000)) < len(text) / 10
    almost = random_payload(970) + b"\1" * 30
    assert pack_frame(almost, 4000).startswith(frame_header(4000))
    assert len(pack_frame(almost, 4000)) > len(almost)


def gathered(
    tmp_path: Path, chunks: list[bytes], length: int
) -> tuple[list[bytes | None], np.ndarray]:
    """Read chunks of (ROW, VIEW) with the kernel; return each content, None if it declines."""
    from dtcache.store.read_kernel import gather

    path = tmp_path / "chunks"
    path.write_bytes(b"".join(chunks))
    handle = os.open(path, os.O_RDONLY)
    head = np.frombuffer(frame_header(length), np.uint8)
    rows = np.full(len(chunks), ROW)
    views = np.full(len(chunks), VIEW)
    sizes = np.array([len(chunk) for chunk in chunks], np.int64)
    places = np.cumsum(sizes + 40) - sizes
    data = np.full((int(places[-1] + sizes[-1]) + 64) // 8 * 8, 0xAA, np.uint8)
    done = np.zeros(len(chunks), np.bool_)
    used = np.zeros(len(chunks), np.int64)
    handles = np.full(len(chunks), handle, np.int32)
    offsets = np.cumsum(sizes) - sizes
    gather(
        np.arange(len(chunks)),
        handles,
        offsets,
        sizes,
        places,
        rows,
        views,
        SEED,
        head,
        length,
        data,
        done,
        used,
    )
    os.close(handle)
    starts = places + len(head) + BLOCK_HEADER + TAG_BYTES
    found = [
        data[s : s + n].tobytes() if d else None for s, n, d in zip(starts, used, done, strict=True)
    ]
    for place, size in zip(places, sizes, strict=True):
        data[place : place + size] = 0xAA
    return found, data


@pytest.mark.parametrize("length", LENGTHS)
def test_the_kernel_reads_our_frames(tmp_path: Path, length: int) -> None:
    """The kernel reads the content of every frame of ours and writes nothing outside the chunks."""
    payloads = [tagged_payload(size) for size in payload_sizes(length)]
    packed = [pack_frame(payload, length) for payload in payloads]
    found, outside = gathered(tmp_path, [checked(p) for p in packed], length)
    assert (outside == 0xAA).all()
    theirs = [
        p == compress(payload.ljust(length, b"\0"), 1)
        for payload, p in zip(payloads, packed, strict=True)
    ]
    assert all(
        got == payload[TAG_BYTES:]
        for got, payload, other in zip(found, payloads, theirs, strict=True)
        if not other
    )
    for got, payload in zip(found, payloads, strict=True):
        assert got is None or got.rstrip(b"\0") == payload[TAG_BYTES:].rstrip(b"\0")


def test_the_kernel_takes_no_damaged_chunk(tmp_path: Path) -> None:
    """The kernel declines a frame with any changed byte, and the general decoder then raises.

    The chunk's own checksum is not compared: the payload's tag has proved the content.
    """
    chunk = checked(pack_frame(tagged_payload(40), 96))
    damaged = [
        chunk[:k] + bytes([chunk[k] ^ mask]) + chunk[k + 1 :]
        for k in range(len(chunk))
        for mask in (1, 128)
    ]
    found, _ = gathered(tmp_path, [chunk, *damaged, chunk[:-1], chunk[:4], b""], 96)
    whole = tagged_payload(40)[TAG_BYTES:]
    in_checksum = 4 * 2
    assert found[0] == whole
    assert found[1:] == [None] * (len(damaged) - in_checksum) + [whole] * in_checksum + [None] * 3


@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_kernel_declines_a_payload_without_room_for_a_tag(tmp_path: Path, size: int) -> None:
    """A payload of at most 4 bytes has no content, so it is not one that a writer made."""
    found, _ = gathered(tmp_path, [checked(pack_frame(b"\7" * size, 96))], 96)
    assert found == [None]


def test_the_kernel_declines_the_payload_of_another_place(tmp_path: Path) -> None:
    """Only the payload of the row and the view is taken."""
    content = random_payload(40)
    places = [(ROW, VIEW), (ROW + 1, VIEW), (ROW, VIEW + 1), (VIEW, ROW)]
    frames = [pack_frame(tagged(SEED, *place, content), 96) for place in places]
    frames.append(pack_frame(tagged(SEED ^ 1, ROW, VIEW, content), 96))
    found, _ = gathered(tmp_path, [checked(frame) for frame in frames], 96)
    assert found == [content, None, None, None, None]


def test_the_kernel_agrees_with_the_general_way_on_any_frame(tmp_path: Path) -> None:
    """What the kernel reads from a changed frame with a valid checksum equals zstd's output."""
    packed = pack_frame(tagged_payload(40), 96)
    frames = [
        packed[:k] + bytes([b]) + packed[k + 1 :]
        for k in range(len(packed))
        for b in range(0, 256, 5)
    ]
    found, _ = gathered(tmp_path, [checked(frame) for frame in frames], 96)
    taken = 0
    for got, frame in zip(found, frames, strict=True):
        if got is not None:
            out = np.empty(96, np.uint8)
            unpack_chunk(checked(frame), out)
            content = untagged(SEED, ROW, VIEW, out).tobytes()
            assert content.rstrip(b"\0") == got.rstrip(b"\0")
            taken += 1
    assert 0 < taken < len(frames)
