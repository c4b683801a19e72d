"""The clock of a run: seconds, images and the time spent waiting for data."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from dtcache.recipe import Json

T = TypeVar("T")


class Clock:
    """Counts seconds, images and the time spent waiting for data, over all sessions of a run."""

    def __init__(self) -> None:
        self.load_state_dict({"seconds": 0.0, "waited": 0.0, "images": 0})

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"seconds": self.seconds, "waited": self._waited, "images": self._images}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint; what this session counted so far is dropped."""
        self._loaded = state
        self._start = time.monotonic()
        self._before = state["seconds"]
        self._waited = state["waited"]
        self._images = int(state["images"])

    def restart(self) -> None:
        """Drop what this session counted so far: the run has taken no step in it yet."""
        self.load_state_dict(self._loaded)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches, and count the time until each one arrives."""
        source = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(source, None)
            self._waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def count(self, images: int) -> None:
        """Add finished images."""
        self._images += images

    @property
    def seconds(self) -> float:
        """Seconds of work; an earlier session counts up to its last checkpoint."""
        return self._before + time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Images per second."""
        return self._images / max(self.seconds, 1e-9)

    @property
    def share(self) -> float:
        """Share of the time spent waiting for data, 0 to 1."""
        return self._waited / max(self.seconds, 1e-9)

    def line(self) -> Json:
        """Return the clock's fields of a metrics line, rounded."""
        return {
            "seconds": round(self.seconds, 2),
            "images_per_second": round(self.rate, 2),
            "wait_share": round(self.share, 4),
        }
