"""The clock of a run: its shares and rates, over several sessions."""

from collections.abc import Iterator

import pytest

from pipelines.runs import clock as run
from pipelines.runs.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the clock, in seconds; a test sets it."""
    seconds = [100.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: seconds[0])
    return seconds


def two_batches(now: list[float]) -> Iterator[int]:
    """Yield two batches, each after a second."""
    for number in range(2):
        now[0] += 1
        yield number


def test_the_share_of_waiting_is_that_of_the_time_that_batches_take_to_come(
    now: list[float],
) -> None:
    """The waiting share is the time spent on waiting for batches divided by the total time."""
    clock = Clock()
    for _ in clock.waiting(two_batches(now)):
        now[0] += 3
        clock.count(16)
    assert (clock.seconds, clock.rate, clock.share) == (8.0, 4.0, 0.25)
    resumed = Clock()
    resumed.load_state_dict(clock.state_dict())
    now[0] += 8
    assert (resumed.seconds, resumed.rate, resumed.share) == (16.0, 2.0, 0.125)


def test_a_run_that_is_ahead_counts_no_time(now: list[float]) -> None:
    """A restarted clock has the counts of its checkpoint, and counts on from the restart."""
    clock = Clock()
    clock.load_state_dict({"seconds": 8.0, "waited": 2.0, "images": 32})
    for number in clock.waiting(two_batches(now)):
        now[0] += 3
        if number == 0:
            clock.restart()
            assert (clock.seconds, clock.rate, clock.share) == (8.0, 4.0, 0.25)
    assert clock.seconds == 12.0
    assert clock.share == 0.25
    assert clock.state_dict() == {"seconds": 12.0, "waited": 3.0, "images": 32}
