"""Memory of a device: running out of it, and the most that this process has held."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dtcache.errors import DeviceMemoryError


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


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
