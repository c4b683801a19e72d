"""The batch size at which a teacher is fastest, found by trying powers of two."""

import time
from collections.abc import Callable

import numpy as np
import psutil
import torch

from dtcache.device_memory import peak_bytes
from dtcache.errors import DeviceMemoryError
from dtcache.teacher import Teacher
from pipelines.terminal.progress import track

SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
GAIN = 0.97
"""A larger batch is chosen only if its time per view is below this share of the best so far."""
HOST = torch.device("cpu")
PASSES = 2
LONGEST_SECONDS = 20.0
"""If a pass takes longer than this, no larger size is tried."""


def fastest_batch(prepare: Callable[[int], Teacher]) -> int:
    """Return the number of views per pass that takes the least time per view and fits into memory.

    `prepare` makes the teacher for a size. The search ends after two sizes in a row that are no
    faster, or if the next size might not fit: on a CPU, if twice the memory growth so far exceeds
    half of the available memory. Raises DeviceMemoryError if the smallest size does not fit.
    """
    best = SIZES[0]
    least = float("inf")
    worse = 0
    before = peak_bytes(HOST)
    with track("choose batch size", len(SIZES)) as progress:
        for size in SIZES:
            try:
                seconds, on_host = _seconds_per_view(prepare(size))
            except DeviceMemoryError:
                if size == SIZES[0]:
                    raise
                torch.cuda.empty_cache()
                break
            progress.advance(1, f"{size}: {1 / seconds:.1f} views/s")
            worse = 0 if seconds < GAIN * least else worse + 1
            if seconds < GAIN * least:
                best = size
                least = seconds
            # A GPU raises an error if a batch does not fit. Its host memory grows with the loaded
            # libraries, not with the batch.
            crowded = on_host and 2 * (peak_bytes(HOST) - before) > _free_bytes()
            if worse == 2 or seconds * size > LONGEST_SECONDS or crowded:
                break
    return best


def _seconds_per_view(teacher: Teacher) -> tuple[float, bool]:
    """Return the seconds per view of a pass over grey images, and whether a CPU ran it.

    The first pass is a warm-up and is not timed.
    """
    size = teacher.spec.batch_size
    grey_CHW = np.full((3, teacher.view.height, teacher.view.width), 128, np.uint8)
    batch = teacher.batch([teacher.input(grey_CHW, "", False, seed=0, draws=[0], label=0)] * size)
    seconds = []
    for _ in range(1 + PASSES):
        started = time.perf_counter()
        for _ in teacher.features(batch):
            pass
        if teacher.device.type == "cuda":
            torch.cuda.synchronize(teacher.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / size, teacher.device.type != "cuda"


def _free_bytes() -> int:
    # "Available" includes the page cache, which the system gives back; "free" does not.
    return int(psutil.virtual_memory().available) // 2
