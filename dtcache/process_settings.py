"""Settings of this process for a computation: CPU threads, no TF32, glibc's allocator."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD = -1
"""`mallopt` parameter, from glibc's malloc.h."""
M_MMAP_THRESHOLD = -3
"""`mallopt` parameter, from glibc's malloc.h."""
MALLOC_THRESHOLD_BYTES = 2**30


def configure_process(device: torch.device) -> None:
    """Change this process for computing on `device`; each pipeline calls this before it computes.

    fp32 never runs as TF32. On a CPU, glibc keeps freed memory instead of returning it to the
    kernel.
    """
    # A cache's bytes are a function of its recipe, which does not record torch's global switches.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # Otherwise every training step maps, zeroes and unmaps the memory of its feature maps.
        libc = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, MALLOC_THRESHOLD_BYTES)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute on `count` CPU threads inside the block; None changes nothing.

    The number is a constant of a recipe: oneDNN splits a convolution into blocks by the number of
    threads, which changes the last bits of results.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
