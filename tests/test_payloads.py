"""Sections of payloads: any taps come back, and lengths that no encoder writes are refused."""

import struct

import numpy as np
import pytest

from dtcache.errors import PayloadError
from dtcache.payloads import Payloads, Sections, pack

SMALL = Sections(bounds={"t1/a": 64, "t1/b": 32, "t1/c": 128})
LARGE = Sections(bounds={"t1/a": 1 << 17, "t1/b": 32, "t1/c": 128})
LAYOUTS = pytest.mark.parametrize("sections", [SMALL, LARGE], ids=["uint16", "uint32"])


def contents(count: int) -> list[list[bytes]]:
    """Return the sections of `count` payloads; each has a different number of words."""
    rng = np.random.default_rng(count)
    return [[rng.bytes(2 * int(rng.integers(1, 17))) for _ in range(3)] for _ in range(count)]


@LAYOUTS
@pytest.mark.parametrize("padding", [0, 1, 24])
def test_sections_come_back(sections: Sections, padding: int) -> None:
    """Every section is split off again; padding belongs to the last one."""
    wanted = contents(5)
    payloads = pack([sections.join(parts) + bytes(padding) for parts in wanted])
    split = sections.split(payloads)
    assert list(split) == ["t1/a", "t1/b", "t1/c"]
    for tap, found in enumerate(split.values()):
        expected = [parts[tap] + bytes(padding if tap == 2 else 0) for parts in wanted]
        assert [section.tobytes() for section in found] == expected
        assert found.data is payloads.data
        assert not (found.starts % 2).any()


def test_the_lengths_are_those_of_the_specification() -> None:
    """Lengths of all sections but the last come first, in words: uint16, uint32 for large ones."""
    parts = [b"ab" * 3, b"cd", b"ef" * 5]
    assert SMALL.join(parts) == struct.pack("<2H", 3, 1) + b"".join(parts)
    assert LARGE.join(parts) == struct.pack("<2I", 3, 1) + b"".join(parts)
    assert Sections(bounds={"t0/logits": 64}).join([b"abcd"]) == b"abcd"
    assert SMALL.bound == 4 + 64 + 32 + 128


def test_a_failed_sample_has_no_payload() -> None:
    """If a section is empty, so is the payload, and an empty payload has no sections."""
    assert SMALL.join([b"ab", b"", b"cd"]) == b""
    good = SMALL.join([b"ab", b"cd", b"ef"])
    with pytest.raises(PayloadError, match="sections have lengths that no encoder") as caught:
        SMALL.split(pack([good, good, b""]))
    assert caught.value.index == 2


@LAYOUTS
@pytest.mark.parametrize(
    "lengths", [(33, 1), (1, 17), (9, 1), (1, 9), (0xFFFF, 1), (1, 0xFFFF), (8, 2)]
)
def test_hostile_lengths_are_refused(sections: Sections, lengths: tuple[int, int]) -> None:
    """A length beyond the payload or beyond the bound of its section is refused with its index."""
    kind = "<2H" if sections is SMALL else "<2I"
    body = bytes(80) if max(lengths) in (33, 17) else bytes(16)
    limit = len(body) // 2
    bounds = [bound // 2 for bound in sections.bounds.values()]
    fits = lengths[0] <= bounds[0] and lengths[1] <= bounds[1] and sum(lengths) <= limit
    good = sections.join([b"ab", b"cd", b"ef"])
    payloads = pack([good, struct.pack(kind, *lengths) + body])
    if fits:
        assert sum(s.sizes[1] for s in sections.split(payloads).values()) == len(body)
        return
    with pytest.raises(PayloadError, match="a payload does not decode: its sections") as caught:
        sections.split(payloads)
    assert caught.value.index == 1


@LAYOUTS
def test_any_bytes_give_sections_within_the_payload(sections: Sections) -> None:
    """Random payloads are refused, or split into sections that lie inside them, end to end."""
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        size = int(rng.integers(0, 40))
        raw = bytes(int(b) for b in rng.choice([0, 0, 1, 2, 255], size))
        try:
            split = list(sections.split(pack([raw])).values())
        except PayloadError:
            refused += 1
            continue
        ends = [int(s.starts[0] + s.sizes[0]) for s in split]
        assert all(int(s.sizes[0]) >= 0 for s in split) and ends[-1] == size
        assert [int(s.starts[0]) for s in split[1:]] == ends[:-1]
    assert 0 < refused < 2000


def test_an_empty_batch_splits_into_nothing() -> None:
    """An empty batch has no sections."""
    nothing = np.zeros(0, np.int64)
    empty = Payloads(data=np.zeros(8, np.uint8), starts=nothing, sizes=nothing)
    assert [len(found) for found in SMALL.split(empty).values()] == [0, 0, 0]
