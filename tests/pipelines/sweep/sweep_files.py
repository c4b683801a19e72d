"""Sweep files of tiny students, and workers that do jobs in the tests' own process."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from pipelines.sweep.jobs import Job
from pipelines.sweep.plan import Plan
from pipelines.sweep.work import Outcome, do_job

TRAIN = """
[train]
student = "test_resnet"
student_size = 32
epochs = 2
batch_size = 8
warmup_epochs = 1
fpn_width = 16
regressor = "fpn"
precision = "fp32"
device = "cpu"
log_every = 1
log_with = "none"
"""


class InProcess:
    """Does one job at a time, in this process."""

    def __init__(self) -> None:
        self._left: list[Future[Outcome]] = []

    def is_free(self) -> bool:
        """Return whether the outcome of the last job has been read."""
        return not self._left

    def submit(self, job: Job, log: Path) -> "Future[Outcome]":
        """Do the job and return its finished future."""
        left = self._left

        class Finished(Future[Outcome]):
            def result(self, timeout: float | None = None) -> Outcome:
                left.clear()
                return super().result(timeout)

        future = Finished()
        left.append(future)
        future.set_result(do_job(job, log))
        return future


@contextmanager
def in_process(plan: Plan, options: object) -> Iterator[InProcess]:
    """Stand in for `start_workers`."""
    yield InProcess()


def sweep_text(cache: Path, images: Path, *, seeds: str = "[0, 1]", more: str = "") -> str:
    """Return a sweep of a trained arm and a random start, probed on images."""
    return f"""
seeds = {seeds}
baseline = "random"
{TRAIN}
[[cache]]
name = "scenes"
path = "{cache}"
[[arm]]
name = "mse"
cache = "scenes"
[arm.train]
loss = "mse"
[[arm]]
name = "random"
start = "random"
{more}
[evaluate.probe]
train = "{images}"
limit_train = 24
limit_test = 8
device = "cpu"
precision = "fp32"
"""
