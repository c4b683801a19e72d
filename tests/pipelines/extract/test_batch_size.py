"""`--batch-size auto`: how the size is found, and that the recipe records it."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import pipelines.extract.batch_size as batch
import pipelines.extract.plan as plan_module
from cli import main
from dtcache.errors import DeviceMemoryError
from dtcache.store.manifest import read_manifest
from pipelines.extract.batch_size import fastest_batch

MEMINFO = Path("/proc/meminfo")


class Timed:
    """A teacher whose passes take the seconds that a test sets, on a clock of the test."""

    def __init__(self, size: int, seconds: float, clock: list[float], fails: bool = False) -> None:
        self.spec = SimpleNamespace(batch_size=size)
        self.view = SimpleNamespace(height=4, width=4)
        self.device = torch.device("cpu")
        self._seconds = seconds
        self._clock = clock
        self._fails = fails

    def input(self, pixels_CHW: np.ndarray, *named: object, **more: object) -> np.ndarray:
        """Return the pixels."""
        return pixels_CHW

    def batch(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Return the inputs."""
        assert len(inputs) == self.spec.batch_size
        return inputs

    def features(self, inputs: list[np.ndarray]) -> Iterator[dict[str, object]]:
        """Advance the clock by the pass's time."""
        if self._fails:
            raise DeviceMemoryError("no room")
        self._clock[0] += self._seconds
        yield {}


@pytest.mark.parametrize(
    ("seconds", "fails_at", "best"),
    [
        (
            {2: 1.0, 4: 1.2, 8: 1.6, 16: 3.15, 32: 6.3},
            None,
            8,
        ),  # 0.5, 0.3, 0.2, 0.197, 0.197 per view: no 3 % after 8
        ({2: 1.0, 4: 1.2, 8: 1.6, 16: 2.4, 32: 4.9, 64: 9.8}, None, 16),
        ({2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, 16, 8),  # the next size does not fit
        ({2: 10.0, 4: 18.0, 8: 30.0, 16: 50.0}, None, 8),  # passes grow too long to try larger ones
    ],
)
def test_the_fastest_size_that_fits(
    seconds: dict[int, float], fails_at: int | None, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search picks the least time per view, within the limits of memory and of patience."""
    clock = [0.0]
    monkeypatch.setattr(batch.time, "perf_counter", lambda: clock[0])
    tried = []

    def prepare(size: int) -> Timed:
        tried.append(size)
        return Timed(size, seconds.get(size, 1e3), clock, fails=size == fails_at)

    assert fastest_batch(prepare) == best
    assert len(tried) <= len(seconds)


def test_memory_that_is_nearly_used_up_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size is not tried if twice the growth so far exceeds half of the free memory."""
    clock = [0.0]
    peaks = iter([0, 100, 1000, 10_000])
    monkeypatch.setattr(batch.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(batch, "peak_bytes", lambda device: next(peaks))
    monkeypatch.setattr(batch, "_free_bytes", lambda: 1500)
    assert fastest_batch(lambda size: Timed(size, 1.0, clock)) == 4


@pytest.mark.skipif(not MEMINFO.exists(), reason="asks Linux")
def test_memory_that_the_page_cache_holds_counts_as_available() -> None:
    """The memory limit is half of the kernel's MemAvailable, which includes the page cache."""

    def agree() -> bool:
        available = (
            int(re.search(r"^MemAvailable: +(\d+) kB$", MEMINFO.read_text(), re.M)[1]) * 1024
        )
        return batch._free_bytes() == pytest.approx(available / 2, rel=0.02)

    assert any(agree() for _ in range(20)), (
        "others take and give memory between two readings, but not each time"
    )


def test_the_memory_of_the_host_does_not_limit_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA only the GPU's own refusal and the patience limit end the search."""
    clock = [0.0]
    seconds = {2: 1.0, 4: 1.2, 8: 1.6, 16: 2.4, 32: 4.9, 64: 9.8}
    monkeypatch.setattr(batch.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(batch.torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(batch, "_free_bytes", lambda: -1)

    def prepare(size: int) -> Timed:
        teacher = Timed(size, seconds[size], clock)
        teacher.device = torch.device("cuda")
        return teacher

    assert fastest_batch(prepare) == 16


def test_auto_is_chosen_once_and_recorded(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe records the size that was found, and a resume uses it without a new search."""
    found = iter([4])
    monkeypatch.setattr(plan_module, "fastest_batch", lambda prepare: next(found))
    flags = [
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--batch-size",
        "auto",
        "--limit",
        "8",
        "--shard-rows",
        "8",
    ]
    command = [
        "extract",
        str(scene_folder),
        "--teacher",
        str(teacher_dir),
        "--out",
        str(tmp_path / "c"),
        *flags,
    ]
    for _ in range(2):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "c").recipe["teacher"]["batch_size"] == 4


def test_a_word_that_is_no_number_is_refused(tmp_path: Path) -> None:
    """The only word accepted in place of a number is `auto`."""
    result = CliRunner().invoke(
        main, ["extract", str(tmp_path), "--teacher", "t", "--out", "o", "--batch-size", "big"]
    )
    assert result.exit_code == 2
    assert "'big' is not a valid integer" in result.output
