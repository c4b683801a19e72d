"""The encoded payloads of a batch, without padding: from the store to the entropy decoder.

A payload of features holds all taps of one timestep of one view, one section per tap.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtcache.errors import PayloadError

SLACK = 8
"""Bytes after the last payload. A decoder may read them, but never uses their values."""
WORD = 2
"""Sections have whole words of this many bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Payloads:
    """B payloads of one array, or their sections of one tap.

    Payload i is `data[starts[i] : starts[i] + sizes[i]]`. In the array, each payload is padded with
    zeros to L bytes.
    """

    data: NDArray[np.uint8]
    """uint8: one buffer for all payloads, SLACK bytes longer than the end of the last payload."""
    starts: NDArray[np.int64]
    """(B,) int64: the first byte of each payload, an even number."""
    sizes: NDArray[np.int64]
    """(B,) int64: bytes of each payload. A payload may include some of the zeros that pad it."""

    def __len__(self) -> int:
        """Return B."""
        return len(self.starts)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Return one payload, uint8, as a slice that shares the buffer."""
        start = self.starts[index]
        return self.data[start : start + self.sizes[index]]

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the payloads as slices that share the buffer."""
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sections:
    """How the sections of a timestep's taps lie in a payload.

    A payload begins with the lengths of all sections but the last, in words: uint16 if no section
    can have more than 2^16 - 1 words, else uint32. The sections follow.
    """

    bounds: Mapping[str, int]
    """Upper bound of the bytes of each tap's section, in the order of the taps."""

    @property
    def _length_type(self) -> str:
        return "<u2" if max(self.bounds.values()) // WORD < 1 << 16 else "<u4"

    @property
    def _head(self) -> int:
        """Bytes of the lengths."""
        return np.dtype(self._length_type).itemsize * (len(self.bounds) - 1)

    @property
    def bound(self) -> int:
        """Upper bound of the bytes of a payload."""
        return self._head + sum(self.bounds.values())

    def join(self, sections: Sequence[bytes]) -> bytes:
        """Return the payload of one view; it is empty if a section is empty: the sample failed."""
        if not all(sections):
            return b""
        lengths = np.array([len(section) // WORD for section in sections[:-1]], self._length_type)
        return lengths.tobytes() + b"".join(sections)

    def split(self, payloads: Payloads) -> dict[str, Payloads]:
        """Return the sections of B payloads by tap, without a copy.

        Raises PayloadError, with the index in the batch, if a length exceeds the payload or the
        bound of its section.
        """
        lengths = np.zeros((len(payloads), len(self.bounds) + 1), np.int64)
        lengths[:, 0] = self._head
        self._require(payloads.sizes >= self._head)
        if self._head:
            places = payloads.starts[:, None] + np.arange(self._head)
            heads = payloads.data[places].view(self._length_type)
            lengths[:, 1:-1] = heads.astype(np.int64) * WORD
        self._require((lengths[:, 1:-1] <= list(self.bounds.values())[:-1]).all(1))
        # The bounds keep these sums far below 2^63.
        lengths[:, -1] = payloads.sizes - lengths[:, :-1].sum(1)
        self._require(lengths[:, -1] >= 0)
        edges = payloads.starts[:, None] + np.cumsum(lengths, 1)
        return {
            name: Payloads(data=payloads.data, starts=edges[:, tap], sizes=lengths[:, tap + 1])
            for tap, name in enumerate(self.bounds)
        }

    @staticmethod
    def _require(valid: Any) -> None:
        """Raise PayloadError for the first payload whose entry in `valid`, bool (B,), is false."""
        if not valid.all():
            raise PayloadError(
                "a payload does not decode: its sections have lengths that no encoder writes",
                int(np.argmin(valid)),
            )


def pack(payloads: Sequence[bytes]) -> Payloads:
    """Copy payloads into one buffer, one after the other."""
    sizes = np.array([len(payload) for payload in payloads], np.int64)
    ends = np.cumsum((sizes + 7) // 8 * 8)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(sizes)]
    data = np.zeros((int(ends[-1]) if len(ends) else 0) + SLACK, np.uint8)
    for payload, start in zip(payloads, starts, strict=True):
        data[start : start + len(payload)] = np.frombuffer(payload, np.uint8)
    return Payloads(data=data, starts=starts, sizes=sizes)
