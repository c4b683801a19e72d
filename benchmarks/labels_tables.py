"""The tables of labels.py, made from the results that are there."""

import re
import statistics
from collections.abc import Sequence
from typing import Any

from pages import Records, write_page
from paired import bounds, interval
from records import Results

ARMS = ("random", "feature", "label", "label-exact", "mixed", "interpreter")
GOALS = (
    ("mixed", "random", 5.0),
    ("mixed", "feature", 0.0),
    ("mixed", "label", -1.0),
    ("label", "label-exact", -1.0),
)
"""Arm, the arm it is compared with, and the goal: the least paired difference in points of mIoU.
"""
OWN_GOALS = (("mixed", "label", -1.0), ("label", "label-exact", -1.0))
"""The same of students that are not finetuned, by their own heads."""
MOST_SHARE = 0.10
Scores = dict[str, dict[str, float]]
"""Test mIoU by seed and number of the finetuning."""
LOSSES = (("mixed", "label", "label"), ("mixed", "feature", "mse"))
"""Arm, the arm it is compared with, and the held-out loss that both are trained on."""
HELD_OUT = (
    "Held-out losses are measured after distillation and before finetuning, on the cache's own "
    "held-out images: the MSE averaged over taps, and the cross-entropy with the stored labels. "
    "The "
    "minimum of the cross-entropy is the entropy of these labels, so label-exact, with other "
    "labels, "
    "is not comparable. Own head: test mIoU of the student after distillation. Finetunings of the "
    "same start differ in the order of images, crops and jitter. A difference compares the means "
    "over the finetunings that both starts have; intervals are over seeds."
)


def write_tables(results: Results) -> None:
    """Write the page of all experiments."""
    write_page(results.folder.parent, "labels.md", "labels.py", experiment_lines)


def experiment_lines(records: Records) -> list[str]:
    """Return one experiment's tables."""
    found = {name: record["result"] for name, record in records.items()}
    scenes = not any("--train " in record["command"] for record in records.values())
    counts = sorted({int(name[1:].split("-")[0]) for name in found if re.match(r"n[0-9]+-", name)})
    return [line for count in counts for line in count_lines(found, count, scenes)]


def count_lines(found: dict[str, Any], count: int, judged: bool) -> list[str]:
    """Return the table of one number of labelled images, the differences that goals are set for,
    and labels' bytes.

    Goals are those of scenes: other images are reported without.
    """
    runs = scores_of(found, count, r"(?:-finetuning([0-9]+))?")
    own = scores_of(found, count, "-own()")
    lines = [
        f"### {count} labelled images",
        "",
        "| start | seeds | finetunings | held-out MSE | held-out labels | own head | test mIoU | "
        "over random, paired | "
        "over feature, paired |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, scores in runs.items():
        seeds = sorted({*scores, *own[arm]})
        if seeds:
            times = sum(map(len, scores.values())) if arm != "interpreter" else 0
            losses = [
                held_out(found, [f"n{count}-{seed}-{arm}" for seed in seeds], kind)
                for kind in ("mse", "label")
            ]
            against = [
                paired(scores, runs[other]) if other != arm else []
                for other in ("random", "feature")
            ]
            differences = [interval(pairs, "") if pairs else "-" for pairs in against]
            words = [
                arm,
                str(len(seeds)),
                str(times or "-"),
                *losses,
                mean(own[arm]),
                mean(scores),
                *differences,
            ]
            lines.append(f"| {' | '.join(words)} |")
    goals = [
        *goal_lines(runs, GOALS, "", judged),
        *goal_lines(own, OWN_GOALS, ", own heads", judged),
    ]
    return [
        *lines,
        "",
        HELD_OUT,
        "",
        *goals,
        *loss_lines(found, count),
        *cost_lines(found, count),
        "",
    ]


def scores_of(found: dict[str, Any], count: int, ending: str) -> dict[str, Scores]:
    """Return the scores of every arm's students: of the results of these names, the ending's group
    tells repeats.
    """
    runs: dict[str, Scores] = {arm: {} for arm in ARMS}
    for name, result in found.items():
        matched = re.fullmatch(rf"n{count}-(seed[0-9]+)-({'|'.join(ARMS)}){ending}", name)
        if matched:
            runs[matched[2]].setdefault(matched[1], {})[matched[3] or "0"] = result["miou"]
    return runs


def mean(scores: Scores) -> str:
    """Return the mean over seeds of the mean of their repeats, as text."""
    return (
        f"{statistics.mean(statistics.mean(of.values()) for of in scores.values()):.2f}"
        if scores
        else "-"
    )


def held_out(found: dict[str, Any], arms: Sequence[str], kind: str) -> str:
    """Return the mean of the losses of an arm's students, those of some seeds, before they were
    finetuned.
    """
    losses = [found[f"{arm}-held-out"][kind] for arm in arms if f"{arm}-held-out" in found]
    return f"{statistics.mean(losses):.3f}" if losses and None not in losses else "-"


def paired(scores: Scores, others: Scores) -> list[float]:
    """Return the differences by seed, each the mean over the repeats that both have."""
    found = []
    for seed in sorted(scores.keys() & others.keys()):
        common = scores[seed].keys() & others[seed].keys()
        if common:
            found.append(
                statistics.mean(scores[seed][number] - others[seed][number] for number in common)
            )
    return found


def goal_lines(
    runs: dict[str, Scores], goals: Sequence[tuple[str, str, float]], what: str, judged: bool
) -> list[str]:
    """Return the differences, and whether each goal is met: an interval on both sides of it decides
    nothing.
    """
    lines = []
    for arm, other, least in goals:
        differences = paired(runs[arm], runs[other])
        if differences:
            _, low, high = bounds(differences)
            verdict = "met" if low >= least else "missed" if high < least else "undecided"
            goal = f", goal at least {least:+g}: {verdict}" if judged else ""
            lines.append(f"- {arm} over {other}{what}: {interval(differences, '')} points{goal}")
    return lines


def loss_lines(found: dict[str, Any], count: int) -> list[str]:
    """Return how much higher each loss is for students trained on both, paired by seed."""
    lines = []
    for arm, other, kind in LOSSES:
        losses: list[Scores] = [{}, {}]
        for name, result in found.items():
            matched = re.fullmatch(rf"n{count}-(seed[0-9]+)-({arm}|{other})-held-out", name)
            if matched:
                losses[matched[2] == other][matched[1]] = {"0": result[kind]}
        differences = paired(*losses)
        if differences:
            lines.append(
                f"- {arm} over {other}, held-out {kind} loss: {interval(differences, '', 3)}"
            )
    return lines


def cost_lines(found: dict[str, Any], count: int) -> list[str]:
    """Return the size and accuracy of the label sets, averaged over seeds."""
    lines = []
    for kind in ("labels", "labels-exact"):
        sets: Sequence[dict[str, Any]] = [
            r for n, r in found.items() if re.fullmatch(rf"n{count}-seed[0-9]+-{kind}", n)
        ]
        if sets:
            share, error = (
                statistics.mean(s[name] for s in sets) for name in ("share", "total_variation")
            )
            most = max(s["share"] for s in sets)
            goal = f", goal at most {MOST_SHARE:.0%}: {'met' if most <= MOST_SHARE else 'missed'}"
            lines.append(
                f"- {kind}: {share:.1%} of the features' bytes (at most "
                f"{most:.2%}{goal if kind == 'labels' else ''}), "
                f"total variation {error:.4f}, entropy "
                f"{statistics.mean(s['entropy'] for s in sets):.3f} bits, "
                f"mIoU over the whole cache "
                f"{100 * statistics.mean(s['agreement']['miou'] for s in sets):.2f}"
            )
    return lines
