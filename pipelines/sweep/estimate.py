"""The estimate of a sweep's time, from its finished steps and from a few timed training steps."""

import statistics
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table

from pipelines.sweep.jobs import Job
from pipelines.sweep.plan import Plan
from pipelines.sweep.records import finished
from pipelines.terminal.text import duration


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """The time that a job is expected to take."""

    seconds: float
    """Of the steps whose time is known."""
    unknown: int
    """Steps whose time is not known."""

    def __str__(self) -> str:
        """Return the time as text."""
        if not self.unknown:
            return duration(self.seconds)
        return f"over {duration(self.seconds)}" if self.seconds else "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The jobs of a sweep that are left, with their expected times."""

    plan: Plan
    left: dict[str, Expected]
    """By name of the job."""

    @property
    def total(self) -> Expected:
        """The time of all jobs that are left, one after the other."""
        return Expected(
            seconds=sum(job.seconds for job in self.left.values()),
            unknown=sum(job.unknown for job in self.left.values()),
        )


def estimate(plan: Plan) -> Estimate:
    """Return the jobs that are left, each with its expected time; nothing is written.

    A student takes as long as the finished students of its arm on average, an evaluation as long
    as the finished ones of its task. If no student of an arm is finished, a few training steps are
    taken and timed. Raises what `Plan.left` and building a student raise.
    """
    known: dict[str, float | None] = {}
    taken: dict[str, list[float]] = {}
    for step in (step for job in plan.jobs for step in job.steps()):
        record = finished(step)
        if record is not None:
            taken.setdefault(step.kind, []).append(record.wall_seconds)
    known |= {kind: statistics.fmean(seconds) for kind, seconds in taken.items()}
    return Estimate(plan=plan, left={job.name: _expected(job, known) for job in plan.left()})


def _expected(job: Job, known: dict[str, float | None]) -> Expected:
    """Return a job's expected time; `known` has the seconds of a step by kind, and gains some."""
    missing = [step.kind for step in job.steps() if finished(step) is None]
    for kind in missing:
        if kind not in known:
            known[kind] = job.timed(kind)
    seconds = [known[kind] for kind in missing]
    return Expected(
        seconds=sum(value for value in seconds if value is not None), unknown=seconds.count(None)
    )


def render_estimate(estimated: Estimate) -> RenderableType:
    """Return the jobs as a table, and the sum of the expected times."""
    table = Table(title=f"{len(estimated.left)} of {len(estimated.plan.jobs)} jobs left")
    for column in ("job", "steps", "state", "time"):
        table.add_column(column, justify="right" if column in ("steps", "time") else "left")
    for job in estimated.plan.jobs:
        expected = estimated.left.get(job.name)
        state = "done" if expected is None else "left"
        shown = "-" if expected is None else str(expected)
        table.add_row(job.name, str(len(list(job.steps()))), state, shown)
    total = estimated.total
    line = f"in total: {total}, one job after the other"
    if total.unknown:
        line += (
            f"; the time of {total.unknown} steps is unknown until a step of their kind is finished"
        )
    return Group(table, line)
