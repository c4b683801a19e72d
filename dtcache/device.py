"""The device and precision of a computation, and the process settings for it."""

import ctypes
import os
import platform
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dtcache.errors import ConfigError, DeviceMemoryError

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD = -1
"""`mallopt` parameter, from glibc's malloc.h."""
M_MMAP_THRESHOLD = -3
"""`mallopt` parameter, from glibc's malloc.h."""
MALLOC_THRESHOLD_BYTES = 2**30
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


class DeviceClock:
    """Seconds that a device spends on marked work; on a GPU the clock never synchronises."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._running: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the work that the block computes, or enqueues on a GPU."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        stream = torch.cuda.current_stream(self._device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(stream)
        yield
        last.record(stream)
        self._running.append((first, last))
        self._drain()

    @property
    def seconds(self) -> float:
        """Seconds of all stretches that the device has finished."""
        self._drain()
        return self._seconds

    def _drain(self) -> None:
        while self._running and self._running[0][1].query():
            first, last = self._running.pop(0)
            self._seconds += first.elapsed_time(last) / 1000


@contextmanager
def memory_errors(batch_size: int, remedy: str) -> Iterator[None]:
    """Raise DeviceMemoryError, ending with `remedy`, if the block runs out of device memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the device ran out of memory with {batch_size} views per pass "
            f"({str(error).splitlines()[0]}); {remedy}"
        ) from error


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


def compiled(module: torch.nn.Module) -> Callable[..., Any]:
    """Return torch.compile's version of a module; the two share their weights.

    The first call raises ConfigError if this machine has no working compiler. The first backward
    pass compiles too: run it inside `compile_errors`.
    """
    # Graphs compiled earlier in the process would change the last bits of this module's results.
    torch._dynamo.reset()
    network = torch.compile(module, dynamic=False)

    def call(*arguments: Any) -> Any:
        with compile_errors():
            return network(*arguments)

    return call


@contextmanager
def compile_errors() -> Iterator[None]:
    """Raise ConfigError if torch.compile fails in the block; other exceptions pass unchanged."""
    with warnings.catch_warnings():
        # diffusers warns of its caches, which change no result.
        warnings.filterwarnings("ignore", module="torch")
        try:
            yield
        except RuntimeError as error:
            # The compiler's errors share no base class, and their modules load only with a
            # compilation.
            if not type(error).__module__.startswith(
                ("torch._dynamo", "torch._inductor", "torch._functorch")
            ):
                raise
            first, *more = str(error).splitlines() or [type(error).__name__]
            reason = " ".join([first, *more[:1]]) if first.endswith(":") else first
            raise ConfigError(f"`compile`: {reason}; run without it") from error


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


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
