"""Devices: names that are refused, settings of the process, and out-of-memory errors."""

import platform
import resource

import pytest
import torch

from dtcache.device import configure_process, memory_errors, resolve_compute
from dtcache.errors import ConfigError, DeviceMemoryError

PIXELS = 2**24


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("gpu", "auto", r"`device` gpu: expected auto, cpu, cuda or cuda:N \("),
        ("meta", "auto", r"`device` meta: expected auto, cpu, cuda or cuda:N$"),
        ("cuda:99", "auto", r"`device` cuda:99: this machine has [0-9]+ CUDA devices; use cpu"),
        (
            "cpu",
            "fp16",
            r"`precision` fp16: expected a CUDA device, got cpu; use bf16 or fp32 on a CPU",
        ),
        ("cpu", "fp8", r"`precision` fp8: expected auto, fp32, bf16 or fp16$"),
    ],
)
def test_unusable_devices_are_refused(device: str, precision: str, message: str) -> None:
    """An unknown, missing or unsupported device is refused, and so is an unsupported precision."""
    with pytest.raises(ConfigError, match=message):
        resolve_compute(device, precision)


def test_fp32_is_never_tf32() -> None:
    """Convolutions and matrix products use all 24 bits of fp32, even if TF32 was switched on."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    configure_process(torch.device("cpu"))
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_running_out_of_memory_says_what_to_do() -> None:
    """An out-of-memory error has the batch size, the device's first line and a remedy."""
    with (
        pytest.raises(
            DeviceMemoryError,
            match=r"ran out of memory with 8 views per pass \(no room\); use less$",
        ),
        memory_errors(8, "use less"),
    ):
        raise torch.OutOfMemoryError("no room\nand more words")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_freed_memory_is_reused() -> None:
    """On a CPU, repeated allocations of 64 MiB stop causing page faults (glibc reuses it)."""
    configure_process(torch.device("cpu"))
    faults = []
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(PIXELS)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # The first allocations grow the heap, and other allocations may split it; the later ones fit
    # into free blocks.
    assert sum(faults[-5:]) < PIXELS * 4 // resource.getpagesize()
