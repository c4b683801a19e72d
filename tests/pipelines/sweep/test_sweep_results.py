"""The comparison of arms and its reports: pairs, ties, one seed, and nothing unescaped."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from scipy import stats

from dtcache.options import EvaluateOptions, TrainOptions
from pipelines.sweep.plan import Plan
from pipelines.sweep.report import MARKDOWN, PAGE, score_tables, write_reports
from pipelines.sweep.results import Row, compare
from pipelines.sweep.sweep_file import Arm, SweepFile, Task

HOSTILE = '<script>alert("x")</script>|`*'
VALUES = {
    "base": {0: [50.0, 52.0], 1: [60.0, 60.0], 2: [55.0, 57.0]},
    "better": {0: [55.0, 57.0], 1: [64.0, 66.0], 2: [62.0, 62.0]},
    HOSTILE: {0: [50.0, 50.0], 1: [61.0, 63.0]},
}


def rows(values: dict[str, dict[int, list[float]]]) -> list[Row]:
    """Return the rows of a task `scenes` with two evaluation seeds per student."""
    return [
        Row(
            arm=arm,
            seed=seed,
            task="scenes",
            evaluation_seed=number,
            metric="miou",
            value=value,
            cpu_seconds=2.0,
            wall_seconds=1.0,
            shared=1,
            version="0",
            commit="abc",
        )
        for arm, seeds in values.items()
        for seed, of_seed in seeds.items()
        for number, value in enumerate(of_seed)
    ]


def plan_of(out: Path, names: Sequence[str]) -> Plan:
    """Return the plan of a sweep whose folder has no runs."""
    arms = tuple(
        Arm(name=name, train=TrainOptions(student=HOSTILE), caches=("c",)) for name in names
    )
    task = Task(name="scenes", options=EvaluateOptions(train=Path("x")), seeds=(0, 1))
    file = SweepFile(
        path=Path(f"{HOSTILE.replace('/', '')}.toml"),
        seeds=(0, 1, 2),
        baseline="base",
        share=False,
        caches=(),
        arms=arms,
        tasks=(task,),
    )
    return Plan(file=file, out=out, jobs=(), runs=())


def test_evaluations_are_averaged_before_students_are_paired() -> None:
    """An arm's values are means over evaluation seeds; differences are paired by seed."""
    (comparison,) = compare(rows(VALUES), list(VALUES), "base")
    base, better, hostile = comparison.arms
    assert base.values == {0: 51.0, 1: 60.0, 2: 56.0}
    assert base.difference is None
    assert better.spread.n == 3
    found = better.difference
    assert found is not None
    low, high = stats.ttest_rel([56, 65, 62], [51, 60, 56]).confidence_interval()
    assert (found.mean, found.low, found.high) == pytest.approx((16 / 3, low, high))
    assert found.verdict == "higher"
    other = hostile.difference
    assert other is not None
    assert (other.n, other.mean, other.verdict) == (2, 0.5, "tie")


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    """With one seed the table says that there is no interval, standard deviation or power."""
    one = {arm: {0: seeds[0]} for arm, seeds in VALUES.items()}
    (table,) = score_tables(plan_of(tmp_path, list(VALUES)), rows(one))
    assert table.rows[0] == ("base", "51.00", "-", "1", "-", "-", "-", "-")
    assert table.rows[1][1:] == ("56.00", "-", "1", "+5.00", "none (n = 1)", "no interval", "-")


def test_reports_escape_every_name(tmp_path: Path) -> None:
    """Names and options reach neither the page nor the Markdown as markup."""
    write_reports(plan_of(tmp_path, list(VALUES)), rows(VALUES))
    page = (tmp_path / PAGE).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page
    text = (tmp_path / MARKDOWN).read_text()
    assert "<script" not in text
    row = next(line for line in text.splitlines() if line.startswith("| &lt;script>"))
    assert row.replace("\\|", "").count("|") == 9
    assert "| better | 61.00 | 4.58 | 3 | +5.33 | [+3.90, +6.77] | higher | 1.88 |" in text


def test_per_tap_losses_stand_beside_the_mean(tmp_path: Path) -> None:
    """The table of the held-out MSE has a column per tap, and no table of its own per tap."""
    losses = [
        Row(
            arm=arm,
            seed=seed,
            task="training",
            evaluation_seed=None,
            metric=metric,
            value=value + seed,
            cpu_seconds=1.0,
            wall_seconds=1.0,
            shared=2,
            version="0",
            commit="",
        )
        for arm in ("base", "better")
        for seed in (0, 1)
        for metric, value in (("mse", 0.5), ("mse/t20/stride2", 0.25), ("mse/t20/stride4", 0.75))
    ]
    (table,) = score_tables(plan_of(tmp_path, ["base", "better"]), losses)
    assert table.headings[-2:] == ("t20/stride2", "t20/stride4")
    assert table.rows[1][1] == "1.0000"
    assert table.rows[1][-2:] == ("0.7500", "1.2500")
    write_reports(plan_of(tmp_path, ["base", "better"]), losses)
    assert "students on one loader share its time equally" in (tmp_path / MARKDOWN).read_text()
