"""Where and in which precision tensors are computed, resolved once at the start of a command."""

import ctypes
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch

from dtcache.errors import ConfigError, DeviceMemoryError

Precision = Literal["fp32", "bf16", "fp16"]
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3  # of malloc.h
KEPT_BYTES = 2**30
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """A device and the autocast precision used on it."""

    device: torch.device
    precision: Precision

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of the precision; fp32 leaves arithmetic as it is."""
        return torch.autocast(
            self.device.type, dtype=AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST
        )


def resolve_compute(device: str, precision: str) -> Compute:
    """Resolve `auto` to CUDA where there is one, and to bf16 where the hardware computes it natively.

    From then on fp32 is fp32 in this process, never TF32, and on a CPU it keeps memory that it frees. Raises
    ConfigError for a device that this machine does not have or that is neither, and for fp16 on a CPU.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        where = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"--device {device}: expected auto, cpu, cuda or cuda:N ({error})"
        ) from error
    if where.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if where.type == "cuda" and (
        not torch.cuda.is_available() or (where.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    if precision == "auto":
        precision = "bf16" if _has_native_bf16(where) else "fp32"
    if precision == "fp16" and where.type == "cpu":
        raise ConfigError(
            "--precision fp16: expected a CUDA device, got cpu; use bf16 or fp32 there"
        )
    assert precision in get_args(Precision), "options and recipes name known precisions"
    # A cache's bytes are a function of its recipe, which does not know of the process's switches.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if where.type == "cpu":
        _keep_freed_memory()
    return Compute(device=where, precision=cast(Precision, precision))


class DeviceClock:
    """Seconds that a device has spent on marked stretches of work; on a GPU it never waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._running: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is computed, or enqueued, inside."""
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
        """Seconds of the stretches that are over."""
        self._drain()
        return self._seconds

    def _drain(self) -> None:
        while self._running and self._running[0][1].query():
            first, last = self._running.pop(0)
            self._seconds += first.elapsed_time(last) / 1000


@contextmanager
def memory_errors(batch_size: int, remedy: str) -> Iterator[None]:
    """Raise a device's running out of memory as DeviceMemoryError, which ends with what to do about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the device ran out of memory with {batch_size} views a pass ({str(error).splitlines()[0]}); {remedy}"
        ) from error


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute on so many CPU threads, None for as many as before.

    It is a constant of a recipe: how oneDNN cuts a convolution into blocks hangs on their number, and so do last bits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compiled(module: torch.nn.Module) -> Callable[..., Any]:
    """Return torch.compile's version of a module, which shares its weights.

    Its first call raises ConfigError where the machine has no compiler that works; its first backward pass compiles
    too, and belongs into `compile_errors`.
    """
    # Graphs that the process compiled before would change what is compiled now, and so its last bits.
    torch._dynamo.reset()
    network = torch.compile(module, dynamic=False)

    def call(*arguments: Any) -> Any:
        with compile_errors():
            return network(*arguments)

    return call


@contextmanager
def compile_errors() -> Iterator[None]:
    """Raise a failure of torch.compile within the block as ConfigError; another failure passes as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", module="torch"
        )  # of caches in diffusers, which change no result
        try:
            yield
        except RuntimeError as error:
            # The compiler's errors have no common parent, and their module is loaded only where something compiles.
            if not type(error).__module__.startswith(
                ("torch._dynamo", "torch._inductor", "torch._functorch")
            ):
                raise
            first, *more = str(error).splitlines() or [type(error).__name__]
            reason = " ".join([first, *more[:1]]) if first.endswith(":") else first
            raise ConfigError(f"--compile: {reason}; run without it") from error


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step: else a step's maps are mapped, zeroed and unmapped each time."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, KEPT_BYTES)


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    # oneDNN has fast bf16 convolutions only where the CPU has the instructions; elsewhere it is slower than fp32.
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe is not None and probe())
