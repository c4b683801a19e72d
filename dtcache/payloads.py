"""The encoded payloads of a batch, without padding: from the store to the entropy decoder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SLACK = 8
"""Bytes after the last payload. A decoder may read them, but never uses their values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Payloads:
    """B payloads of one array.

    Payload i is `data[starts[i] : starts[i] + sizes[i]]`. In the array, each payload is padded with
    zeros to L bytes.
    """

    data: NDArray[np.uint8]
    """uint8: one buffer for all payloads, SLACK bytes longer than the end of the last payload."""
    starts: NDArray[np.int64]
    """(B,) int64: the first byte of each payload, a multiple of 8."""
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


def pack(payloads: Sequence[bytes]) -> Payloads:
    """Copy payloads into one buffer, one after the other."""
    sizes = np.array([len(payload) for payload in payloads], np.int64)
    ends = np.cumsum((sizes + 7) // 8 * 8)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(sizes)]
    data = np.zeros((int(ends[-1]) if len(ends) else 0) + SLACK, np.uint8)
    for payload, start in zip(payloads, starts, strict=True):
        data[start : start + len(payload)] = np.frombuffer(payload, np.uint8)
    return Payloads(data=data, starts=starts, sizes=sizes)
