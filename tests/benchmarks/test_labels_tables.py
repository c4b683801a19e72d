"""The tables of label distillation pair results by seed and judge goals by intervals."""

from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def lines_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A function that makes the tables from results by name."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from labels_tables import experiment_lines

    return lambda results, command="": experiment_lines(
        {name: {"result": result, "command": command} for name, result in results.items()}
    )


def test_differences_are_of_the_seeds_that_both_arms_have(
    lines_of: Callable[..., list[str]],
) -> None:
    """An arm's mean uses all its seeds; differences use the seeds that both arms have."""
    found = lines_of(
        {
            "n40-seed0-random": {"miou": 10.0},
            "n40-seed1-random": {"miou": 20.0},
            "n40-seed0-mixed": {"miou": 17.0},
            "n40-seed1-mixed": {"miou": 29.0},
            "n40-seed2-mixed": {"miou": 44.0},
            "n40-seed0-mixed-held-out": {"mse": 0.2, "label": 0.5},
            "n40-seed1-mixed-held-out": {"mse": 0.4, "label": 0.7},
            "n40-seed3-mixed-held-out": {"mse": 9.0, "label": 9.0},
        }
    )
    [row] = [line for line in found if line.startswith("| mixed |")]
    # Student's t of one degree of freedom, 12.706, times the standard error of 7 and 9, which is 1.
    assert row == "| mixed | 3 | 3 | 0.300 | 0.600 | - | 30.00 | +8.00 [-4.71, +20.71] | - |"


def test_several_finetunings_of_a_start_count_by_their_mean(
    lines_of: Callable[..., list[str]],
) -> None:
    """Several finetunings of one seed count by their mean, and intervals are taken over seeds."""
    found = lines_of(
        {
            "n40-seed0-random": {"miou": 10.0},
            "n40-seed0-random-finetuning1": {"miou": 20.0},
            "n40-seed1-random": {"miou": 20.0},
            "n40-seed0-label": {"miou": 20.0},
            "n40-seed0-label-finetuning1": {"miou": 24.0},
            "n40-seed1-label": {"miou": 29.0},
            "n40-seed1-label-finetuning1": {"miou": 99.0},
        }
    )
    [row] = [line for line in found if line.startswith("| label |")]
    # The mean of 22 and 64; 22 over 15 and 29 over 20: differences of 7 and 9 as above.
    assert row == "| label | 2 | 4 | - | - | - | 43.00 | +8.00 [-4.71, +20.71] | - |"


def test_students_are_compared_by_their_own_heads_too(lines_of: Callable[..., list[str]]) -> None:
    """The score before finetuning has its own column and goal.

    A student that is never finetuned has a row, too.
    """
    found = lines_of(
        {
            f"n40-seed{seed}-{arm}{what}": {"miou": score}
            for seed in range(3)
            for arm, own, finetuned in (
                ("label", 28.0 + 0.1 * seed, 60.0),
                ("label-exact", 28.0, 70.0),
            )
            for what, score in (("", finetuned + seed), ("-own", own))
        }
        | {
            "n40-seed0-mixed-own": {"miou": 29.0},
            "n40-seed0-mixed-held-out": {"mse": 0.5, "label": 0.6},
        }
    )
    assert "| mixed | 1 | - | 0.500 | 0.600 | 29.00 | - | - | - |" in found
    [row] = [line for line in found if line.startswith("| label |")]
    assert row.startswith("| label | 3 | 3 | - | - | 28.10 | 61.00 |")
    assert (
        "- label over label-exact, own heads: +0.10 [-0.15, +0.35] points, goal at least -1: met"
        in found
    )
    assert (
        "- label over label-exact: -10.00 [-10.00, -10.00] points, goal at least -1: missed"
        in found
    )


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [((7.0, 7.1, 7.2), "met"), ((1.0, 1.1, 1.2), "missed"), ((1.0, 5.0, 9.0), "undecided")],
)
def test_a_goal_is_met_where_the_whole_interval_is(
    lines_of: Callable[..., list[str]], gains: tuple[float, ...], verdict: str
) -> None:
    """A goal is met if the whole interval lies above it, and undecided if the interval spans it."""
    found = lines_of(
        {
            f"n20-seed{seed}-{arm}": {"miou": 30.0 + (gain if arm == "mixed" else 0.0)}
            for seed, gain in enumerate(gains)
            for arm in ("random", "mixed")
        }
    )
    [line] = [line for line in found if line.startswith("- mixed over random")]
    assert line.endswith(f"goal at least +5: {verdict}")


def test_other_images_than_scenes_are_reported_without_goals(
    lines_of: Callable[..., list[str]],
) -> None:
    """Results on other images than scenes show differences without a verdict."""
    found = lines_of(
        {"n40-seed0-random": {"miou": 30.0}, "n40-seed0-mixed": {"miou": 31.0}},
        "labels.py --name x --train TRAIN",
    )
    assert "- mixed over random: +1.00 [-inf, +inf] points" in found


def test_held_out_losses_are_paired(lines_of: Callable[..., list[str]]) -> None:
    """Mixed students' held-out label loss is compared with label students', mse with feature's."""
    losses = {"label": (None, 0.5), "mixed": (0.25, 0.625), "feature": (0.125, None)}
    found = lines_of(
        {
            f"n40-seed{seed}-{arm}-held-out": {"mse": mse, "label": label}
            for seed in range(2)
            for arm, (mse, label) in losses.items()
        }
    )
    assert "- mixed over label, held-out label loss: +0.125 [+0.125, +0.125]" in found
    assert "- mixed over feature, held-out mse loss: +0.125 [+0.125, +0.125]" in found
