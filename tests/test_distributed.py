"""A process joins others only if the environment describes a group."""

import pytest

from dtcache.distributed import Processes, join_processes
from dtcache.errors import ConfigError

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "0", "RANK": "0"},
        {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "3", "WORLD_SIZE": "4"},
    ],
)
def test_a_process_without_a_group_is_alone(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables that containers and cluster managers set alone start no process group."""
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes, compute = join_processes("cpu", "fp32")
    assert processes == Processes(rank=0, world_size=1)
    assert compute.device.type == "cpu"


def test_a_group_that_is_not_described_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes without an address end in one line that names what is missing."""
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError,
        match=r"names 2 processes \(WORLD_SIZE\), but not MASTER_ADDR, MASTER_PORT; start "
        r"the processes with torchrun",
    ):
        join_processes("cpu", "fp32")
