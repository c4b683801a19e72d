"""The facts of this machine for a bug report: versions, devices, speed, a folder's locks."""

import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Group, RenderableType
from rich.table import Table

from dtcache._version import __version__
from dtcache.atomic_files import NO_LOCK, UNSUPPORTED, FolderLock, disk_errors
from dtcache.device import AUTOCAST, resolve_compute
from dtcache.errors import CacheBusyError, ConfigError, NoLocksWarning
from dtcache.recipe import Json
from pipelines.disk_space import free_bytes
from pipelines.terminal.text import byte_size

PACKAGES = (
    "torchvision",
    "timm",
    "diffusers",
    "transformers",
    "accelerate",
    "numpy",
    "numba",
    "pyarrow",
    "zarr",
    "numcodecs",
    "pillow",
    "dask",
    "distributed",
    "click",
)
VARIABLES = (
    NO_LOCK,
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
)
INSTRUCTIONS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)
"""Instruction sets that decide the speed of torch, by their names in /proc/cpuinfo."""
CPU_INFO = Path("/proc/cpuinfo")
DISK_BYTES = 32 * 2**20
CHANNELS = 64
SIDE = 32
VIEWS = 8
SECONDS = 0.3
"""Least time for which a convolution is repeated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A device that torch can use, and its speed on one 3x3 convolution."""

    name: str
    model: str
    memory_bytes: int
    auto_precision: str
    """The precision that `precision='auto'` chooses on this device."""
    fp32_ms: float
    """Median milliseconds of the convolution in fp32."""
    bf16_ms: float
    """The same under autocast to bf16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """The disk of a folder."""

    folder: str
    file_system: str
    free_bytes: int
    write_bytes_per_second: float
    """Of one file of 32 MiB, with fsync."""
    read_bytes_per_second: float
    """Of the same file, after the kernel was asked to drop its pages; it may keep them."""
    folder_fsync: bool
    """Whether the file system can fsync a folder."""
    lock: str
    """exclusive: a second lock is refused. unsupported: there is no flock. off: DTCACHE_NO_LOCK is
    set. shared: two locks were granted at once, so locks protect nothing.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """The machine, the installed versions, and the disk of a folder if one was given."""

    versions: Mapping[str, str | None]
    """By package; None if the package is not installed."""
    system: str
    cores: int
    """Cores that this process may use."""
    threads: int
    """Threads of torch."""
    cpu_capability: str
    """The instruction set that torch chose."""
    instructions: tuple[str, ...]
    memory_bytes: int
    variables: Mapping[str, str]
    """Environment variables that are set and change what dtcache does."""
    devices: tuple[Device, ...]
    disk: Disk | None

    def to_json(self) -> Json:
        """Return JSON values."""
        return asdict(self)

    def render(self) -> RenderableType:
        """Return tables for a terminal and a bug report."""
        tables = [_facts("machine", self._machine())]
        tables += [_facts(device.name, _device_facts(device)) for device in self.devices]
        if self.disk is not None:
            tables.append(_facts(self.disk.folder, _disk_facts(self.disk)))
        return Group(*tables)

    def _machine(self) -> dict[str, str]:
        installed = (f"{name} {version}" for name, version in self.versions.items() if version)
        return {
            "versions": ", ".join(installed),
            "missing": ", ".join(name for name, v in self.versions.items() if not v) or "none",
            "system": self.system,
            "CPU": f"{self.cores} cores, {self.threads} threads of torch",
            "instructions": f"{' '.join(self.instructions) or 'unknown'}; torch uses "
            f"{self.cpu_capability}",
            "memory": byte_size(self.memory_bytes),
            "variables": ", ".join(f"{k}={v}" for k, v in self.variables.items()) or "none",
        }


def diagnose(folder: Path | None = None) -> Diagnosis:
    """Examine this machine, and the disk of `folder` if it is given.

    A temporary folder is made in `folder` and removed. Raises ConfigError if `folder` is not a
    folder, and DiskError if it cannot be written.
    """
    disk = _examine_disk(folder) if folder is not None else None
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return Diagnosis(
        versions={
            "dtcache": __version__,
            "python": platform.python_version(),
            **_versions(),
            "torch": torch.__version__,  # names the build too, such as +cu130 or +cpu
        },
        system=f"{platform.platform()}, {' '.join(platform.libc_ver())}",
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        instructions=_instructions(),
        memory_bytes=psutil.virtual_memory().total,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        devices=tuple(_examine_device(name) for name in names),
        disk=disk,
    )


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _cpu_line(field: str) -> str:
    """Return the first value of a field of /proc/cpuinfo, or an empty text."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(field))
    return next(values, "")


def _instructions() -> tuple[str, ...]:
    known = {*_cpu_line("flags").split(), *_cpu_line("Features").split()}
    return tuple(name for name in INSTRUCTIONS if name in known)


def _examine_device(name: str) -> Device:
    compute = resolve_compute(name, "auto")
    if compute.device.type == "cuda":
        properties = torch.cuda.get_device_properties(compute.device)
        model = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        memory = properties.total_memory
    else:
        model = _cpu_line("model name") or platform.processor() or platform.machine()
        memory = psutil.virtual_memory().total
    return Device(
        name=name,
        model=model,
        memory_bytes=memory,
        auto_precision=compute.precision,
        fp32_ms=_convolution_ms(compute.device, None),
        bf16_ms=_convolution_ms(compute.device, AUTOCAST["bf16"]),
    )


@torch.no_grad()
def _convolution_ms(device: torch.device, dtype: torch.dtype | None) -> float:
    """Return the median milliseconds of one convolution, under autocast to `dtype` if given."""
    convolution = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, device=device)
    images_BCHW = torch.zeros(VIEWS, CHANNELS, SIDE, SIDE, device=device)
    times: list[float] = []
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        convolution(images_BCHW)  # the first call compiles and allocates
        while sum(times) < SECONDS:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            convolution(images_BCHW)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def _examine_disk(folder: Path) -> Disk:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder; pass the one that caches are written to")
    with disk_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-doctor-") as at:
        write, read = _disk_speed(Path(at, "data"))
        return Disk(
            folder=str(folder),
            file_system=_file_system(folder),
            free_bytes=free_bytes(folder),
            write_bytes_per_second=write,
            read_bytes_per_second=read,
            folder_fsync=_can_fsync(Path(at)),
            lock=_lock_state(Path(at, "locked")),
        )


def _disk_speed(file: Path) -> tuple[float, float]:
    """Return the bytes per second of writing and of reading one file."""
    data = os.urandom(DISK_BYTES)
    start = time.perf_counter()
    with open(file, "wb") as target:
        target.write(data)
        target.flush()
        os.fsync(target.fileno())
    write = DISK_BYTES / (time.perf_counter() - start)
    with open(file, "rb") as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while source.read(2**20):
            pass
    return write, DISK_BYTES / (time.perf_counter() - start)


def _can_fsync(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    finally:
        os.close(handle)
    return True


def _lock_state(folder: Path) -> str:
    """Return the state of `Disk.lock`: lock a folder twice, as two processes would."""
    if os.environ.get(NO_LOCK):
        return "off"
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=NoLocksWarning)
        try:
            with FolderLock(folder), FolderLock(folder):
                return "shared"
        except CacheBusyError:
            return "exclusive"
        except NoLocksWarning:
            return "unsupported"


def _file_system(folder: Path) -> str:
    """Return the type of the file system that holds a folder, such as ext4 or nfs4."""
    real = folder.resolve()
    partitions = psutil.disk_partitions(all=True)
    holding = [p for p in partitions if real.is_relative_to(p.mountpoint)]
    return max(holding, key=lambda p: len(p.mountpoint)).fstype if holding else "unknown"


def _facts(title: str, facts: Mapping[str, str]) -> Table:
    table = Table(show_header=False, title=title, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _device_facts(device: Device) -> dict[str, str]:
    ratio = device.fp32_ms / device.bf16_ms
    comparison = (
        f"{ratio:.1f} times as fast as" if ratio >= 1 else f"{1 / ratio:.1f} times slower than"
    )
    return {
        "model": f"{device.model}, {byte_size(device.memory_bytes)}",
        "precision": f"auto is {device.auto_precision}",
        "convolution": f"fp32 {device.fp32_ms:.3g} ms, bf16 {device.bf16_ms:.3g} ms: bf16 is "
        f"{comparison} fp32",
    }


def _disk_facts(disk: Disk) -> dict[str, str]:
    meanings = {
        "exclusive": "work: a second process is refused",
        "unsupported": "not supported: start one process per folder, with --no-lock",
        "off": f"switched off by {NO_LOCK}",
        "shared": "do not work: two locks at once were granted; start one process per folder",
    }
    return {
        "file system": f"{disk.file_system}, {byte_size(disk.free_bytes)} free",
        "speed": f"writes {byte_size(disk.write_bytes_per_second)}/s with fsync, reads "
        f"{byte_size(disk.read_bytes_per_second)}/s",
        "fsync of folders": "works" if disk.folder_fsync else "not supported",
        "locks": meanings[disk.lock],
    }
