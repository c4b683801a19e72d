"""The reports of a sweep: report.md, report.html and the tables of a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from dtcache._version import __version__
from dtcache.atomic_files import write_file
from dtcache.recipe import Json
from pipelines.inspect.compare import text_of
from pipelines.inspect.page.charts import (
    COLOURS,
    Series,
    bar_chart,
    interval_chart,
    legend,
    line_chart,
)
from pipelines.inspect.page.render import write_page
from pipelines.inspect.run_report import held_out_curve, inspect_run, is_run
from pipelines.sweep.jobs import Run
from pipelines.sweep.plan import Plan
from pipelines.sweep.records import finished
from pipelines.sweep.results import MEAN_MSE, ArmResult, Comparison, Row, compare
from pipelines.sweep.statistics import mean_interval
from pipelines.sweep.sweep_file import TRAINING, Arm

MARKDOWN = "report.md"
PAGE = "report.html"
TITLES = {
    "knn_top1": "k-NN top-1, per cent",
    "linear_top1": "linear probe top-1, per cent",
    "finetuned_top1": "finetuned top-1, per cent",
    "finetuned_top5": "finetuned top-5, per cent",
    "ap": "box AP, per cent",
    "ap50": "box AP50, per cent",
    "ap75": "box AP75, per cent",
    "mask_ap": "mask AP, per cent",
    "mask_ap50": "mask AP50, per cent",
    "mask_ap75": "mask AP75, per cent",
    "miou": "mean IoU, per cent",
    "pixel_accuracy": "pixel accuracy, per cent",
    "label": "held-out label loss",
    MEAN_MSE: "held-out MSE, mean over the taps",
}
HEADINGS = ("arm", "mean", "SD", "n", "difference", "95 % interval", "verdict", "detectable")
MOST_POINTS = 200
"""About the most points of a learning curve, so that the page of many long runs stays small."""
SHOWN = 7
"""Columns that a terminal shows."""
NOTES = (
    "`difference` is the arm minus {baseline}, paired by seed, with its 95 % interval by Student's "
    "t. It is a `tie` if the interval contains 0. One pair has no interval. The intervals are not "
    "corrected for the number of comparisons.",
    "`detectable` is the smallest true difference that a two-sided t-test at 5 % finds with 80 % "
    "power, at this n and this standard deviation of the differences.",
    "The held-out MSE is measured on the held-out samples of each arm's own data. Compare it only "
    "between arms of the same data.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """A table of text, for Markdown, HTML and a terminal."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write_reports(plan: Plan, rows: Sequence[Row]) -> None:
    """Write report.md and report.html in the sweep's folder. Raises DiskError."""
    tables = [*score_tables(plan, rows), *cost_tables(plan, rows)]
    status = status_of(plan, rows)
    notes = [note.format(baseline=plan.file.baseline) for note in NOTES]
    lines = [f"# {_cell(plan.file.path.stem)}", "", status, ""]
    for table in tables:
        lines += _markdown(table)
    lines += [f"- {note}" for note in notes]
    write_file(plan.out / MARKDOWN, "\n".join([*lines, ""]).encode())
    write_page(
        plan.out / PAGE,
        "sweep.html.j2",
        {
            "title": plan.file.path.stem,
            "status": status,
            "tables": tables,
            "notes": [note.replace("`", "") for note in notes],
            "scores": _score_charts(plan, rows),
            "curves": _curve_charts(plan),
            "legend": legend(
                [
                    Series(name=arm.name, x=[], y=[], style=_style(number))
                    for number, arm in enumerate(plan.file.arms)
                ]
            ),
            "arms": arm_table(plan.file.arms),
        },
        package="pipelines.sweep",
    )


def render_tables(plan: Plan, rows: Sequence[Row]) -> RenderableType:
    """Return the tables of scores for a terminal."""
    parts: list[RenderableType] = []
    for shown in score_tables(plan, rows):
        table = Table(title=shown.title, title_justify="left")
        # report.md has the other columns, for which a terminal is too narrow.
        for number, heading in enumerate(shown.headings[:SHOWN]):
            table.add_column(heading, justify="right" if number else "left", no_wrap=number > 0)
        for row in shown.rows:
            table.add_row(*row[:SHOWN])
        parts.append(table)
    return Group(*parts, status_of(plan, rows))


def status_of(plan: Plan, rows: Sequence[Row]) -> str:
    """Return a sentence on what is finished."""
    done = [run for run in plan.runs if all(finished(step) for step in run.steps())]
    seeds = ", ".join(map(str, plan.file.seeds))
    commits = ", ".join(sorted({row.commit for row in rows if row.commit}))
    at = f", commit {commits}" if commits else ""
    return (
        f"{len(done)} of {len(plan.runs)} students are finished; seeds {seeds}; compared with "
        f"{plan.file.baseline}; dtcache {__version__}{at}."
    )


def score_tables(plan: Plan, rows: Sequence[Row]) -> list[TextTable]:
    """Return a table per task and metric; the mean MSE has a column per tap beside it."""
    comparisons = compare(rows, [arm.name for arm in plan.file.arms], plan.file.baseline)
    taps = [c for c in comparisons if _is_tap(c)]
    tables = []
    for comparison in sorted(comparisons, key=lambda c: c.task == TRAINING):
        if _is_tap(comparison):
            continue
        beside = taps if (comparison.task, comparison.metric) == (TRAINING, MEAN_MSE) else []
        tables.append(
            TextTable(
                title=_title(comparison),
                headings=(*HEADINGS, *(c.metric.removeprefix("mse/") for c in beside)),
                rows=tuple(
                    (
                        *_cells(result, _digits(comparison)),
                        *(_mean_of(result.arm, c) for c in beside),
                    )
                    for result in comparison.arms
                ),
            )
        )
    return tables


def cost_tables(plan: Plan, rows: Sequence[Row]) -> list[TextTable]:
    """Return a table of the CPU seconds per student: its making, and its evaluations by task."""
    tasks = [TRAINING, *(task.name for task in plan.file.tasks)]
    lines = []
    for arm in plan.file.arms:
        students: dict[str, dict[int | None, float]] = {task: {} for task in tasks}
        steps = {
            (row.seed, row.task, row.evaluation_seed): row.cpu_seconds
            for row in rows
            if row.arm == arm.name
        }
        for (seed, task, _), seconds in steps.items():
            students[task][seed] = students[task].get(seed, 0.0) + seconds
        means = [
            f"{sum(of_task.values()) / len(of_task):.1f}" if of_task else "-"
            for of_task in students.values()
        ]
        lines.append((arm.name, *means))
    shared = any(row.shared > 1 for row in rows)
    note = "; students on one loader share its time equally" if shared else ""
    return [
        TextTable(
            title=f"CPU seconds per student{note}", headings=("arm", *tasks), rows=tuple(lines)
        )
    ]


def arm_table(arms: Sequence[Arm]) -> TextTable:
    """Return the source of each arm, and the options that differ between arms."""
    options = [asdict(arm.train) for arm in arms]
    differing = [name for name in options[0] if len({str(o[name]) for o in options}) > 1]
    return TextTable(
        title="Arms",
        headings=("arm", "source", *differing),
        rows=tuple(
            (arm.name, _source(arm), *(text_of(name, values[name]) for name in differing))
            for arm, values in zip(arms, options, strict=True)
        ),
    )


def _source(arm: Arm) -> str:
    if arm.caches:
        return f"cache{'s' * (len(arm.caches) > 1)} {', '.join(arm.caches)}"
    if arm.images is not None:
        return f"teacher in the loop on {arm.images.name}"
    return "random start" if arm.start is not None else f"backbone {Path(str(arm.backbone)).name}"


def _cells(result: ArmResult, digits: int) -> tuple[str, ...]:
    """Return an arm's row: one cell per heading."""
    spread = result.spread
    first = (
        result.arm,
        f"{spread.mean:.{digits}f}",
        "-" if spread.sd is None else f"{spread.sd:.{digits}f}",
        str(spread.n),
    )
    difference = result.difference
    if difference is None:
        return (*first, "-", "-", "-", "-")
    if difference.low is None or difference.high is None or difference.detectable is None:
        return (*first, f"{difference.mean:+.{digits}f}", "none (n = 1)", "no interval", "-")
    return (
        *first,
        f"{difference.mean:+.{digits}f}",
        f"[{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]",
        difference.verdict,
        f"{difference.detectable:.{digits}f}",
    )


def _mean_of(arm: str, comparison: Comparison) -> str:
    values = [result.spread.mean for result in comparison.arms if result.arm == arm]
    return f"{values[0]:.{_digits(comparison)}f}" if values else "-"


def _is_tap(comparison: Comparison) -> bool:
    return comparison.task == TRAINING and comparison.metric.startswith("mse/")


def _title(comparison: Comparison) -> str:
    title = TITLES.get(comparison.metric, comparison.metric)
    return title if comparison.task == TRAINING else f"{comparison.task}: {title}"


def _digits(comparison: Comparison) -> int:
    return 4 if comparison.task == TRAINING else 2


def _markdown(table: TextTable) -> list[str]:
    lines = [f"## {_cell(table.title)}", ""]
    lines.append(f"| {' | '.join(map(_cell, table.headings))} |")
    lines.append("|---" + "|---:" * (len(table.headings) - 1) + "|")
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in table.rows]
    return [*lines, ""]


def _cell(text: str) -> str:
    """Return text that Markdown shows as it is: no markup, no end of a cell."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for character in "|`*_":
        escaped = escaped.replace(character, f"\\{character}")
    return " ".join(escaped.split())


def _score_charts(plan: Plan, rows: Sequence[Row]) -> list[list[str]]:
    """Return per task and metric: the means with their intervals, and the differences."""
    names = [arm.name for arm in plan.file.arms]
    comparisons = compare(rows, names, plan.file.baseline)
    charts = []
    for comparison in sorted(comparisons, key=lambda c: c.task == TRAINING):
        if _is_tap(comparison):
            continue
        title = _title(comparison)
        row = [
            bar_chart(
                [result.arm for result in comparison.arms],
                [_with_interval(result) for result in comparison.arms],
                title=title,
                y="",
            )
        ]
        compared = [(r.arm, r.difference) for r in comparison.arms if r.difference is not None]
        if compared:
            row.append(
                interval_chart(
                    [arm for arm, _ in compared],
                    [(d.mean, d.low, d.high) for _, d in compared],
                    title=f"difference from {plan.file.baseline}",
                    x="",
                    styles=[_style(names.index(arm)) for arm, _ in compared],
                )
            )
        charts.append(row)
    return charts


def _with_interval(result: ArmResult) -> tuple[float, float | None, float | None]:
    ends = mean_interval(list(result.values.values()))
    low, high = ends if ends is not None else (None, None)
    return result.spread.mean, low, high


def _curve_charts(plan: Plan) -> list[str]:
    """Return the curves of all runs, finished or not: losses by step, one line per student."""
    names = [arm.name for arm in plan.file.arms]
    reports = [(run, inspect_run(run.folder)) for run in plan.runs if is_run(run.folder)]
    taps = list(dict.fromkeys(tap for _, report in reports for tap in report["taps"]))
    charts = [
        ("training loss", [_line(run, names, r["curves"].get("loss")) for run, r in reports]),
        (TITLES[MEAN_MSE], [_line(run, names, _mean_curve(r)) for run, r in reports]),
    ]
    charts += [
        (
            f"held-out MSE of {tap}",
            [_line(run, names, held_out_curve(r, f"mse/{tap}")) for run, r in reports],
        )
        for tap in taps
    ]
    return [
        line_chart([s for s in lines if s.x], title=title, x="step", y="", log_y=True)
        for title, lines in charts
    ]


def _mean_curve(report: Json) -> Json | None:
    """Return the held-out MSE by step as the mean over the taps."""
    curves = [held_out_curve(report, f"mse/{tap}") for tap in report["taps"]]
    known = [curve for curve in curves if curve is not None]
    if not known:
        return None
    columns = zip(*(curve["values"] for curve in known), strict=False)
    return {"steps": known[0]["steps"], "values": [sum(c) / len(c) for c in columns]}


def _line(run: Run, names: Sequence[str], curve: Mapping[str, Sequence[float]] | None) -> Series:
    every = max(1, len(curve["steps"]) // MOST_POINTS) if curve is not None else 1
    return Series(
        name=run.arm,
        x=curve["steps"][::every] if curve is not None else [],
        y=curve["values"][::every] if curve is not None else [],
        style=_style(names.index(run.arm)),
    )


def _style(number: int) -> str:
    return f"c{number % COLOURS}"
