"""A clock of the time that a device spends on marked work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceClock:
    """Seconds that a device spends on marked work; on a GPU the clock never synchronises."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._running: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the work that the block computes, or enqueues on a GPU."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        stream = torch.cuda.current_stream(self._device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(stream)
        yield
        last.record(stream)
        self._running.append((first, last))
        self._drain()

    @property
    def seconds(self) -> float:
        """Seconds of all stretches that the device has finished."""
        self._drain()
        return self._seconds

    def _drain(self) -> None:
        while self._running and self._running[0][1].query():
            first, last = self._running.pop(0)
            self._seconds += first.elapsed_time(last) / 1000
