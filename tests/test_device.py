"""Devices and precisions: what `auto` stands for, and names that are refused."""

import pytest
import torch

from dtcache.device import resolve_compute
from dtcache.errors import ConfigError


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
