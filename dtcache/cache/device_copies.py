"""Batches on their way to a device: page-locked memory, and copies in a side stream."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from dtcache.cache.batch import Rows
from dtcache.cache.loader import Readable


class Movable(Protocol):
    """A batch whose tensors can be changed one by one."""

    def changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the batch with `change` applied to every tensor."""


M = TypeVar("M", bound=Movable)


class Pinned(Generic[M]):
    """A source whose batches lie in pinned memory, from which a GPU copies while it computes."""

    def __init__(self, cache: Readable[M]) -> None:
        self._cache = cache
        self.num_views = cache.num_views
        self.shard_rows = cache.shard_rows
        self.will_need = cache.will_need

    def batch(self, rows: Rows, views: Rows, names: Sequence[str]) -> M:
        """Return the batch of B (row, view) pairs, in pinned memory."""
        return self._cache.batch(rows, views, names).changed(Tensor.pin_memory)


def copied_ahead(batches: Iterable[M], device: torch.device) -> Iterator[M]:
    """Yield batches on the device. On CUDA a side stream copies the next batch ahead."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    waiting: deque[tuple[M, torch.cuda.Event]] = deque()

    def arrived() -> M:
        batch, copied = waiting.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)

        def used_here(x: Tensor) -> Tensor:
            # Otherwise the allocator could give the tensor's memory to the next copy while this
            # stream still reads the tensor.
            x.record_stream(current)
            return x

        return batch.changed(used_here)

    for batch in batches:
        with torch.cuda.stream(stream):
            there = batch.changed(lambda x: x.to(device, non_blocking=True))
            copied = torch.cuda.Event()
            copied.record(stream)
        waiting.append((there, copied))
        if len(waiting) > 1:
            yield arrived()
    while waiting:
        yield arrived()
