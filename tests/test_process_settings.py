"""Settings of this process: no TF32, CPU threads, and an allocator that keeps its memory."""

import platform
import subprocess
import sys

import pytest
import torch

from dtcache.process_settings import configure_process, cpu_threads


def test_fp32_is_never_tf32() -> None:
    """Convolutions and matrix products use all 24 bits of fp32, even if TF32 was switched on."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    configure_process(torch.device("cpu"))
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_number_of_threads_is_restored() -> None:
    """The number of threads is set inside the block only, even if the block fails.

    None changes nothing.
    """
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match=r"^stopped$"), cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError("stopped")
    assert torch.get_num_threads() == before
    with cpu_threads(None):
        assert torch.get_num_threads() == before


ALLOCATE_AND_FREE = """
import resource
import torch
from dtcache.process_settings import configure_process

configure_process(torch.device("cpu"))
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_freed_memory_is_reused() -> None:
    """On a CPU, repeated allocations of 64 MiB stop causing page faults (glibc reuses it).

    A process of its own shows it: in this one, memory that other tests keep may lie at the end of
    the heap, so that no free block is large enough.
    """
    child = subprocess.run(
        [sys.executable, "-c", ALLOCATE_AND_FREE], capture_output=True, text=True, check=True
    )
    faults = [int(line) for line in child.stdout.split()]
    assert len(faults) == 40
    # The first allocations grow and split the heap; the later ones fit into free blocks.
    assert max(faults[-5:]) < 100
