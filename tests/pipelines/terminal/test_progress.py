"""Progress lines where there is no terminal: count, rate, note and time left."""

import pytest

from pipelines.terminal import progress
from pipelines.terminal.progress import track


@pytest.mark.parametrize(
    ("seconds", "finished", "line"),
    [
        (100.0, 0, "sweep: 2/10, 0.0/s running: a\n"),
        (100.0, 1, "sweep: 3/10, 0.6/min running: a, 700 s left\n"),
        (2.0, 4, "sweep: 6/10, 2.0/s running: a, 2 s left\n"),
    ],
)
def test_a_line_has_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    finished: int,
    line: str,
) -> None:
    """The time left is shown once a unit is finished; a slow rate is per minute."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 1.0)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with track("sweep", 10, 2) as tracker:
        now[0] = seconds
        tracker.advance(finished, "running: a")
    assert capsys.readouterr().err == line
