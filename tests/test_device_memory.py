"""Device memory: running out of it is one error with a remedy."""

import pytest
import torch

from dtcache.device_memory import memory_errors
from dtcache.errors import DeviceMemoryError


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
