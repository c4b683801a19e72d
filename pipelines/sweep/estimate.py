"""The estimate of a sweep's time, from the steps of the same sweep that are finished."""

import statistics
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from pipelines.sweep.jobs import Job
from pipelines.sweep.plan import Plan
from pipelines.sweep.records import finished
from pipelines.terminal.text import duration


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a sweep has done, and what is left."""

    plan: Plan
    left: tuple[Job, ...]
    seconds: dict[str, float | None]
    """By job that is left: its expected seconds; None if no like step is finished."""

    @property
    def total(self) -> float | None:
        """Seconds of all jobs that are left, one after the other; None if one is unknown."""
        known = [seconds for seconds in self.seconds.values() if seconds is not None]
        return sum(known) if len(known) == len(self.seconds) else None


def estimate(plan: Plan) -> Estimate:
    """Return the jobs that are left, each with its expected time; nothing is written.

    A student takes as long as the finished students of its arm on average, an evaluation as long
    as the finished ones of its task. Raises what `Plan.left` raises.
    """
    left = plan.left()
    taken: dict[str, list[float]] = {}
    for job in plan.jobs:
        for step in job.steps():
            record = finished(step)
            if record is not None:
                taken.setdefault(step.kind, []).append(record.wall_seconds)
    seconds: dict[str, float | None] = {}
    for job in left:
        missing = [taken.get(step.kind) for step in job.steps() if finished(step) is None]
        means = [statistics.fmean(known) for known in missing if known]
        seconds[job.name] = sum(means) if len(means) == len(missing) else None
    return Estimate(plan=plan, left=tuple(left), seconds=seconds)


def render_estimate(estimated: Estimate) -> RenderableType:
    """Return the jobs as a table, and the sum of the expected times."""
    left = {job.name for job in estimated.left}
    table = Table(title=f"{len(left)} of {len(estimated.plan.jobs)} jobs left")
    for column in ("job", "steps", "state", "time"):
        table.add_column(column, justify="right" if column in ("steps", "time") else "left")
    for job in estimated.plan.jobs:
        state = "left" if job.name in left else "done"
        shown = _shown(estimated.seconds[job.name]) if job.name in left else "-"
        table.add_row(escape(job.name), str(len(list(job.steps()))), state, shown)
    total = estimated.total
    if total is None:
        line = (
            "in total: unknown, because a kind of step has not been done yet; the estimate is the "
            "mean time of finished steps of this sweep"
        )
    else:
        line = f"in total: {duration(total)} one after the other"
    return Group(table, line)


def _shown(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)
