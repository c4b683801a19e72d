"""Where tensors are computed."""

import platform
import resource

import pytest
import torch

from dtcache.device import memory_errors, resolve_compute
from dtcache.errors import ConfigError, DeviceMemoryError

PIXELS = 2**24


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("gpu", "auto", r"--device gpu: expected auto, cpu, cuda or cuda:N \("),
        ("meta", "auto", r"--device meta: expected auto, cpu, cuda or cuda:N$"),
        ("cuda:99", "auto", r"--device cuda:99: this machine has [0-9]+ CUDA devices; use cpu"),
        (
            "cpu",
            "fp16",
            r"--precision fp16: expected a CUDA device, got cpu; use bf16 or fp32 there",
        ),
    ],
)
def test_devices_that_do_not_serve_are_named(device: str, precision: str, message: str) -> None:
    """A device that is no such thing, not here or of no use is refused, and fp16 on a CPU."""
    with pytest.raises(ConfigError, match=message):
        resolve_compute(device, precision)


def test_fp32_is_never_tf32() -> None:
    """Whatever a caller switched on, convolutions and products keep the 24 bits that a recipe's fp32 stands for."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    resolve_compute("cpu", "fp32")
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_running_out_of_memory_says_what_to_do() -> None:
    """The device's own words lose all but their first line."""
    with (
        pytest.raises(
            DeviceMemoryError, match=r"ran out of memory with 8 views a pass \(no room\); use less$"
        ),
        memory_errors(8, "use less"),
    ):
        raise torch.OutOfMemoryError("no room\nand more words")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_memory_that_is_freed_is_there_for_the_next_step() -> None:
    """On a CPU a tensor of 64 MiB is mapped in once, not each time that one is made: its pages fault no more."""
    resolve_compute("cpu", "fp32")
    faults = []
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(PIXELS)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # The first ones grow the heap, which what lies between them may split; the later ones find room.
    assert sum(faults[-5:]) < PIXELS * 4 // resource.getpagesize()
