"""The results of a sweep: one row per run, task and metric, and their comparison by arm."""

import io
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dtcache.atomic_files import write_file
from dtcache.errors import CacheDamagedError
from dtcache.recipe import Json
from pipelines.runs.folder import SUMMARY, read_summary
from pipelines.sweep.jobs import Run
from pipelines.sweep.plan import Plan
from pipelines.sweep.records import Record, finished
from pipelines.sweep.statistics import Difference, Spread, difference, pairs, spread
from pipelines.sweep.sweep_file import TRAINING

RESULTS = "results.parquet"
MEAN_MSE = "mse"
"""Metric of the held-out MSE, as mean over the taps."""
SCHEMA = pa.schema(
    [
        ("arm", pa.string()),
        ("seed", pa.int64()),
        ("task", pa.string()),
        ("evaluation_seed", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("cpu_seconds", pa.float64()),
        ("wall_seconds", pa.float64()),
        ("shared", pa.int64()),
        ("version", pa.string()),
        ("commit", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One metric of one student. The seconds are those of the step that measured it."""

    arm: str
    seed: int | None
    """None for a backbone that all seeds share."""
    task: str
    """Name of the task; `training` for the held-out losses."""
    evaluation_seed: int | None
    """None for the held-out losses."""
    metric: str
    value: float
    cpu_seconds: float
    wall_seconds: float
    shared: int
    """Students that were trained together and share the seconds equally."""
    version: str
    commit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmResult:
    """One arm's values of one metric."""

    arm: str
    values: Mapping[int | None, float]
    """By seed, the mean over the evaluation's seeds."""
    spread: Spread
    difference: Difference | None
    """From the baseline; None for the baseline itself, and if no seed has both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All arms by one metric of one task."""

    task: str
    metric: str
    arms: tuple[ArmResult, ...]


def collect(plan: Plan) -> list[Row]:
    """Return the rows of every step that is finished."""
    return [row for run in plan.runs for row in _rows_of(run)]


def write_results(rows: Sequence[Row], out: Path) -> None:
    """Write `results.parquet`. Raises DiskError."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA), sink)
    write_file(out / RESULTS, sink.getbuffer())


def compare(rows: Sequence[Row], arms: Sequence[str], baseline: str) -> list[Comparison]:
    """Return a comparison per task and metric, in the order of the rows.

    The mean over the seeds of an evaluation is a student's value. Arms without a value are left
    out.
    """
    values: dict[tuple[str, str], dict[str, dict[int | None, list[float]]]] = {}
    for row in rows:
        by_arm = values.setdefault((row.task, row.metric), {})
        by_arm.setdefault(row.arm, defaultdict(list))[row.seed].append(row.value)
    comparisons = []
    for (task, metric), by_arm in values.items():
        means = {
            arm: {seed: statistics.fmean(of_seed) for seed, of_seed in by_arm[arm].items()}
            for arm in arms
            if arm in by_arm
        }
        comparisons.append(
            Comparison(
                task=task,
                metric=metric,
                arms=tuple(
                    ArmResult(
                        arm=arm,
                        values=of_arm,
                        spread=spread(list(of_arm.values())),
                        difference=_difference(of_arm, means.get(baseline, {}), arm == baseline),
                    )
                    for arm, of_arm in means.items()
                ),
            )
        )
    return comparisons


def _difference(
    of_arm: Mapping[int | None, float],
    of_baseline: Mapping[int | None, float],
    is_baseline: bool,
) -> Difference | None:
    paired = [] if is_baseline else pairs(of_arm, of_baseline)
    return difference(paired) if paired else None


def _rows_of(run: Run) -> Iterator[Row]:
    record = finished(run.making())
    if record is not None:
        for metric, value in _held_out(run.folder).items():
            yield _row(run, record, TRAINING, None, metric, value)
    for evaluation in run.evaluations:
        record = finished(run.evaluating(evaluation))
        if record is not None and record.result is not None:
            path = run.evaluating(evaluation).record
            for metric in evaluation.options.scores:
                if (score := _score(record.result, metric, path)) is not None:
                    yield _row(run, record, evaluation.task, evaluation.seed, metric, score)


def _score(result: Json, metric: str, path: Path) -> float | None:
    """Return a metric of an evaluation, per cent; None if the test images do not determine it.

    Raises CacheDamagedError if it is missing or no number.
    """
    value = result.get(metric, "nothing")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise CacheDamagedError(
            f"{path}: expected {metric} of 0 to 100, got {str(value)[:40]!r}; delete it to do "
            "the step again"
        )
    return float(value)


def _held_out(folder: Path) -> dict[str, float]:
    """Return a run's held-out losses: the mean MSE first, then those of the taps."""
    if not (folder / SUMMARY).is_file():
        return {}
    losses = {name: float(value) for name, value in read_summary(folder)["held_out"].items()}
    taps = {name: value for name, value in losses.items() if name.startswith("mse/")}
    mean = {MEAN_MSE: statistics.fmean(taps.values())} if taps else {}
    labels = {name: value for name, value in losses.items() if name == "label"}
    return {**mean, **taps, **labels}


def _row(run: Run, record: Record, task: str, seed: int | None, metric: str, value: float) -> Row:
    return Row(
        arm=run.arm,
        seed=run.seed,
        task=task,
        evaluation_seed=seed,
        metric=metric,
        value=value,
        cpu_seconds=record.cpu_seconds,
        wall_seconds=record.wall_seconds,
        shared=record.shared,
        version=record.version,
        commit=record.commit,
    )
