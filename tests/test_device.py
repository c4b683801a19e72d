"""Where tensors are computed."""

import platform
import resource

import pytest
import torch

from dtcache.device import resolve_compute

PIXELS = 2**24


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_memory_that_is_freed_is_there_for_the_next_step() -> None:
    """On a CPU a tensor of 64 MiB is mapped in once, not each time that one is made: its pages fault no more."""
    resolve_compute("cpu", "fp32")
    faults = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(PIXELS)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # The first ones grow the heap; the later ones find it grown.
    assert max(faults[3:]) < PIXELS * 4 // resource.getpagesize() // 2
