"""The batch size at which a teacher is fastest, found by trying."""

import resource
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch

from dtcache.errors import DeviceMemoryError
from dtcache.teacher import Teacher
from pipelines.terminal.progress import track

SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
GAIN = 0.97
"""A larger batch must take less than this share of the time a view to be worth its memory."""
PASSES = 2
LONGEST_SECONDS = 20.0
"""A size whose pass takes longer is the last one that is tried."""


def fastest_batch(prepare: Callable[[int], Teacher]) -> int:
    """Return the number of views a pass with the least time a view, among powers of two that fit into memory.

    `prepare` makes the teacher for a size. Trying ends where two sizes on end are no faster, or where the next one
    might not fit: on a CPU, where twice the growth so far would take over half of the memory that is available.
    """
    best = SIZES[0]
    least = float("inf")
    worse = 0
    before = _peak_bytes()
    with track("choose batch size", len(SIZES)) as progress:
        for size in SIZES:
            try:
                seconds, on_host = _seconds_a_view(prepare(size))
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
            # A GPU says itself what does not fit; the host's memory grows by its libraries there, not by the batch.
            crowded = on_host and 2 * (_peak_bytes() - before) > _free_bytes()
            if worse == 2 or seconds * size > LONGEST_SECONDS or crowded:
                break
    return best


def _seconds_a_view(teacher: Teacher) -> tuple[float, bool]:
    """Return the time of a pass over grey images, a view, after one that does not count; and whether a CPU ran it."""
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


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free_bytes() -> int:
    # What is free leaves out the page cache, which the system gives back.
    return int(psutil.virtual_memory().available) // 2
