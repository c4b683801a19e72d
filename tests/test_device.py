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


@pytest.mark.parametrize(
    ("limit", "capability", "precision"),
    [
        (None, "AVX512", "bf16"),
        ("AVX512_CORE_BF16", "AVX512", "bf16"),
        ("AVX512_CORE_AMX", "AVX512", "bf16"),
        ("AVX512_CORE_VNNI", "AVX512", "fp32"),
        ("AVX2", "AVX2", "fp32"),
        (None, "AVX2", "fp32"),
    ],
)
def test_auto_precision_respects_excluded_instructions(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, capability: str, precision: str
) -> None:
    """On a CPU with AVX512-BF16, auto is bf16 only if the environment lets oneDNN and torch use it.

    oneDNN reads ONEDNN_MAX_CPU_ISA. torch's own kernels have the capability that torch reports.
    """
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert resolve_compute("cpu", "auto").precision == precision


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
