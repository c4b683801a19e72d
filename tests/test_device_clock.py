"""The clock of a device counts marked work only."""

import time

import pytest
import torch

from dtcache.device_clock import DeviceClock


def test_only_marked_work_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the clock sums the seconds inside its blocks, and none between them."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = DeviceClock(torch.device("cpu"))
    for inside, between in ((2.0, 50.0), (0.5, 7.0)):
        with clock.running():
            now[0] += inside
        now[0] += between
    assert clock.seconds == 2.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_work_that_a_gpu_has_finished_is_counted() -> None:
    """On a GPU the clock has the time of enqueued work once the device has finished it."""
    device = torch.device("cuda")
    clock = DeviceClock(device)
    with clock.running():
        torch.cuda._sleep(10_000_000)
    torch.cuda.synchronize(device)
    assert clock.seconds > 0
