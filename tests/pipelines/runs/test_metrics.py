"""A run's clock, its metrics file and its trackers."""

import pytest

from pipelines.runs import metrics as run
from pipelines.runs.metrics import Clock


def test_the_share_of_waiting_is_that_of_the_time_that_batches_take_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The waiting share is the time spent on waiting for batches divided by the total time."""
    now = [100.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])

    def slow() -> object:
        for number in range(2):
            now[0] += 1
            yield number

    clock = Clock()
    for _ in clock.waiting(slow()):
        now[0] += 3
        clock.count(16)
    assert (clock.seconds, clock.rate, clock.share) == (8.0, 4.0, 0.25)
    resumed = Clock()
    resumed.load_state_dict(clock.state_dict())
    now[0] += 8
    assert (resumed.seconds, resumed.rate, resumed.share) == (16.0, 2.0, 0.125)
