"""The payloads of a batch as the store reads them and the entropy decoder takes them: packed, without their padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SLACK = 8
"""Bytes after the last payload that a decoder may touch, but never uses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Payloads:
    """B payloads of one array. Payload i is `data[starts[i] : starts[i] + sizes[i]]`; zeros follow it up to L."""

    data: NDArray[np.uint8]
    """One buffer for all of them, SLACK bytes longer than the last payload's end."""
    starts: NDArray[np.int64]
    """(B,): multiples of 8."""
    sizes: NDArray[np.int64]
    """(B,): bytes. A payload may end in some of the zeros that pad it."""

    def __len__(self) -> int:
        """Return B."""
        return len(self.starts)

    def __getitem__(self, place: int) -> NDArray[np.uint8]:
        """Return one payload as a view."""
        start = self.starts[place]
        return self.data[start : start + self.sizes[place]]

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the payloads as views."""
        return (self[place] for place in range(len(self)))


def pack(payloads: Sequence[bytes]) -> Payloads:
    """Lay payloads out one after the other."""
    sizes = np.array([len(payload) for payload in payloads], np.int64)
    ends = np.cumsum((sizes + 7) // 8 * 8)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(sizes)]
    data = np.zeros((int(ends[-1]) if len(ends) else 0) + SLACK, np.uint8)
    for payload, start in zip(payloads, starts, strict=True):
        data[start : start + len(payload)] = np.frombuffer(payload, np.uint8)
    return Payloads(data=data, starts=starts, sizes=sizes)
