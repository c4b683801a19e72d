"""The device of a computation and its precision, from the options that name them."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from dtcache.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
BF16_ISAS = ("BF16", "FP16", "AMX", "AVX10")
"""Parts of the names of oneDNN's instruction sets (ONEDNN_MAX_CPU_ISA) that have AVX512-BF16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """A device and the autocast precision used on it."""

    device: torch.device
    precision: Precision

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of the precision; it does nothing for fp32."""
        return torch.autocast(
            self.device.type, dtype=AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST
        )


def resolve_compute(device: str, precision: str) -> Compute:
    """Return the device and precision that the names stand for; nothing in the process changes.

    Device `auto` is CUDA if available, else the CPU. Precision `auto` is bf16 if the hardware
    computes bf16 natively, else fp32. Raises ConfigError if the device is unknown or not in this
    machine, and for fp16 on a CPU.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        resolved = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"`device` {device}: expected auto, cpu, cuda or cuda:N ({error})"
        ) from error
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"`device` {device}: expected auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda" and (
        not torch.cuda.is_available() or (resolved.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"`device` {device}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return Compute(device=resolved, precision=_resolve_precision(precision, resolved))


def _resolve_precision(name: str, device: torch.device) -> Precision:
    match name:
        case "auto":
            return "bf16" if _has_native_bf16(device) else "fp32"
        case "fp16" if device.type == "cpu":
            raise ConfigError(
                "`precision` fp16: expected a CUDA device, got cpu; use bf16 or fp32 on a CPU"
            )
        case "fp32" | "bf16" | "fp16":
            return name
    raise ConfigError(f"`precision` {name}: expected auto, fp32, bf16 or fp16")


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    # oneDNN has fast bf16 convolutions only for CPUs with AVX512-BF16. Elsewhere fp32 is faster: a
    # training step with AVX2 took ten times as long in bf16. Environment variables can exclude
    # instructions that the CPU has.
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    allowed = limit in ("DEFAULT", "ALL") or any(isa in limit for isa in BF16_ISAS)
    capability = torch.backends.cpu.get_cpu_capability()
    return bool(probe is not None and probe()) and allowed and capability.startswith("AVX512")
