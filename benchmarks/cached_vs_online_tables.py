"""The tables of cached_vs_online.py, made from the results that are there."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from pages import Records, write_page
from paired import bounds, interval
from records import Results

CPU_LIMIT = 1.10
GPU_LIMIT = 1.03
SPEEDUP = 0.9
WAITING = 0.02
QUALITY = 1.0
"""Goal: the most, in per cent, by which an arm's MSE may exceed the online arm's.

It applies to arms of at most twice the bytes of one draw.
"""
EPOCHS = 100
STUDENTS = (1, 3, 10)


def write_tables(results: Results) -> None:
    """Write the page of all experiments."""
    write_page(results.folder.parent, "students.md", "cached_vs_online.py", experiment_lines)


def experiment_lines(records: Records) -> list[str]:
    """Return one experiment's tables."""
    found = {name: record["result"] for name, record in records.items()}
    machines = {name: record["machine"] for name, record in records.items()}
    return [
        *speed_lines(found, machines),
        *quality_lines(found),
        *noise_lines(found),
        *whitening_lines(found),
    ]


def verdict(low: float, high: float, goal: float) -> str:
    """Return met, missed or undecided for an interval that must lie below a goal."""
    return "met" if high <= goal else "missed" if low > goal else "undecided"


def speed_lines(found: dict[str, Any], machines: dict[str, str]) -> list[str]:
    """Return seconds per step by arm, the goals of speed and waiting, and the break-even epochs."""
    runs = {
        name.removeprefix("speed-"): r for name, r in found.items() if name.startswith("speed-")
    }
    if not runs:
        return []
    lines = [
        "### Speed and waiting",
        "",
        "Seconds per step, medians over blocks. Ratios are of paired blocks: cached/online is "
        "their mean with its 95 % interval, the others are medians.",
        "",
    ]
    lines += [
        "| student | limit | cached | online | teacher alone | cached/online, 95 % | cached/limit "
        "| speed-up of possible speed-up | waiting |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for student, run in runs.items():
        limit = GPU_LIMIT if "," in machines[f"speed-{student}"] else CPU_LIMIT
        over = statistics.median(c / m for c, m in zip(run["cached"], run["limit"], strict=True))
        possible = [(t + m) / m for t, m in zip(run["teacher"], run["limit"], strict=True)]
        gained = [o / c for o, c in zip(run["online"], run["cached"], strict=True)]
        share = statistics.median(g / p for g, p in zip(gained, possible, strict=True))
        waiting = statistics.median(run["waiting"])
        medians = [
            f"{statistics.median(run[arm]):.4f}" for arm in ("limit", "cached", "online", "teacher")
        ]
        mean, low, high = bounds([1 / ratio for ratio in gained])
        goals = [
            f"{mean:.2f} [{low:.2f}, {high:.2f}]",
            f"{over:.3f} ({verdict(over, over, limit)})",
            f"{statistics.median(gained):.2f} of {statistics.median(possible):.2f}: {share:.2f} "
            f"({verdict(-share, -share, -SPEEDUP)})",
            f"{waiting:.1%} ({verdict(waiting, waiting, WAITING)})",
        ]
        lines.append(f"| {' | '.join([student, *medians, *goals])} |")
    return [*lines, "", *break_even_lines(found, runs), *projection_lines(found)]


def break_even_lines(found: dict[str, Any], runs: dict[str, Any]) -> list[str]:
    """Return the epochs after which a cache has saved its extraction time, by student count."""
    if "extract" not in found:
        return []
    seconds = found["extract"]["seconds"]
    lines = [f"| student | {' | '.join(f'{n} student' + 's' * (n > 1) for n in STUDENTS)} |"]
    lines.append("|---" * (len(STUDENTS) + 1) + "|")
    for student, run in runs.items():
        saved = (statistics.median(run["online"]) - statistics.median(run["cached"])) * run[
            "steps_per_epoch"
        ]
        even = [f"{seconds / (n * saved):.1f}" if saved > 0 else "never" for n in STUDENTS]
        lines.append(f"| {student} | {' | '.join(even)} |")
    text = (
        f"The extraction took {seconds:.0f} s. Epochs per student after which the cache has saved "
        "as much time:"
    )
    return [text, "", *lines, ""]


def projection_lines(found: dict[str, Any]) -> list[str]:
    """Return the arithmetic of ADM at 256 px with a ResNet-50, in operations, not seconds."""
    if "projection" not in found:
        return []
    teacher = found["projection"]["teacher"] / 1e9
    student = found["projection"]["student"] / 1e9
    lines = [
        f"Projection, by arithmetic alone: ADM at 256 px, cut off after stride 4, is {teacher:.0f} "
        f"GFLOP per view, a "
        f"ResNet-50 with FPN-256 and PPM is {student:.0f} GFLOP per step and view (three times its "
        f"forward pass; a "
        f"multiply-add is two). Online is then {(teacher + student) / student:.1f} times cached. "
        f"With {EPOCHS} epochs "
        "and both flips cached, teacher and students together cost, online over cached:",
        "",
        "| students | online | cached | ratio |",
        "|---|---|---|---|",
    ]
    for n in STUDENTS:
        online = n * EPOCHS * (teacher + student)
        cached = 2 * teacher + n * EPOCHS * student
        lines.append(
            f"| {n} | {online / 1e3:.0f} TFLOP | {cached / 1e3:.0f} TFLOP | {online / cached:.1f} |"
        )
    return [*lines, ""]


def by_seed(found: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    """Return results by arm and seed of one part."""
    arms: dict[str, dict[str, Any]] = {}
    for name, result in found.items():
        if name.startswith(f"{part}-seed"):
            seed, arm = name.removeprefix(f"{part}-").split("-", 1)
            arms.setdefault(arm, {})[seed] = result
    return arms


def compared(
    arms: dict[str, dict[str, Any]], arm: str, against: str, of: Callable[[Any, Any], float]
) -> list[float]:
    """Return one difference per seed that both arms have."""
    both = sorted(arms.get(arm, {}).keys() & arms.get(against, {}).keys())
    return [of(arms[arm][seed], arms[against][seed]) for seed in both]


def quality_lines(found: dict[str, Any]) -> list[str]:
    """Return each arm beside the online one of its seed."""
    arms = by_seed(found, "quality")
    scenes = by_seed(found, "scenes-quality")
    if "online" not in arms:
        return []
    lines = [
        "### Quality",
        "",
        "Against the mean of 16 fresh draws of unseen images; differences from online, paired by ",
    ]
    lines[-1] += (
        "seed, with their 95 % interval. The gap is the held-out loss divided by the training loss."
    )
    headings = (
        "arm | seeds | bytes per image | MSE | MSE | AT | gap | linear probe | points | mIoU | "
        "points | goal"
    )
    lines += ["", f"| {headings} |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|---|"]
    one = (
        statistics.mean(r["bytes_per_image"] for r in arms["1-draw"].values())
        if "1-draw" in arms
        else None
    )
    for arm, seeds in arms.items():
        mse = compared(arms, arm, "online", lambda a, b: 100 * (a["mse"] / b["mse"] - 1))
        at = compared(arms, arm, "online", lambda a, b: 100 * (a["at"] / b["at"] - 1))
        probe = compared(arms, arm, "online", lambda a, b: a["linear_top1"] - b["linear_top1"])
        miou = compared(scenes, arm, "online", lambda a, b: a["miou"] - b["miou"])
        size = statistics.mean(r.get("bytes_per_image", 0) for r in seeds.values())
        goal = "-"
        if arm != "online" and one and size <= 2.02 * one and mse:
            goal = verdict(*bounds(mse)[1:], QUALITY)
        cells = [arm, str(len(seeds)), f"{size:.0f}" if size else "-", mean(seeds, "mse", 4)]
        cells += [interval(mse, "%"), interval(at, "%")] if mse and arm != "online" else ["-", "-"]
        cells += [
            f"{statistics.mean(r['own_held_out'] / r['train_loss'] for r in seeds.values()):.3f}"
        ]
        cells += [
            mean(seeds, "linear_top1", 2),
            interval(probe, "") if probe and arm != "online" else "-",
        ]
        cells += [
            mean(scenes.get(arm, {}), "miou", 2),
            interval(miou, "") if miou and arm != "online" else "-",
            goal,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *tap_lines(arms)]


def tap_lines(arms: dict[str, dict[str, Any]]) -> list[str]:
    """Return each arm's MSE per tap, averaged over its seeds."""
    names = [
        name for name in next(iter(arms["online"].values()))["losses"] if name.startswith("mse/")
    ]
    headings = [name.removeprefix("mse/") for name in names]
    lines = [f"| MSE per tap | {' | '.join(headings)} |", "|---" * (len(names) + 1) + "|"]
    for arm, seeds in arms.items():
        means = [
            statistics.mean(result["losses"][name] for result in seeds.values()) for name in names
        ]
        lines.append(f"| {arm} | {' | '.join(f'{value:.4f}' for value in means)} |")
    return [*lines, ""]


def noise_lines(found: dict[str, Any]) -> list[str]:
    """Return the effect of noise weighting against one plain draw, paired by seed."""
    arms = {
        part: by_seed(found, f"{part}noise")
        | {"plain": by_seed(found, f"{part}quality").get("1-draw", {})}
        for part in ("", "scenes-")
    }
    if "weighted" not in arms[""]:
        return []
    lines = [
        "### Noise weighting",
        "",
        "One draw, with --noise-weighting against without, paired by seed.",
        "",
    ]
    lines += ["| seeds | MSE | AT | linear probe, points | mIoU, points |", "|---|---|---|---|---|"]
    mse = compared(arms[""], "weighted", "plain", lambda a, b: 100 * (a["mse"] / b["mse"] - 1))
    at = compared(arms[""], "weighted", "plain", lambda a, b: 100 * (a["at"] / b["at"] - 1))
    probe = compared(
        arms[""], "weighted", "plain", lambda a, b: a["linear_top1"] - b["linear_top1"]
    )
    miou = compared(arms["scenes-"], "weighted", "plain", lambda a, b: a["miou"] - b["miou"])
    cells = [
        interval(v, unit) if v else "-"
        for v, unit in ((mse, "%"), (at, "%"), (probe, ""), (miou, ""))
    ]
    return [*lines, f"| {len(mse)} | {' | '.join(cells)} |", ""]


def whitening_lines(found: dict[str, Any]) -> list[str]:
    """Return the 2x2 of whitening and losses; MSE is in the unit of each whitening, AT and the
    probes compare.
    """
    arms = by_seed(found, "whitening")
    scenes = by_seed(found, "scenes-whitening")
    if not arms:
        return []
    lines = [
        "### Whitening",
        "",
        "MSE is in the unit of each arm's own whitening; the other columns compare. ",
    ]
    lines[-1] += (
        "In brackets what the attention loss adds to its whitening, paired by seed, with its 95 % "
        "interval."
    )
    lines += [
        "",
        "| arm | seeds | MSE | AT | linear probe | k-NN | mIoU |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, seeds in arms.items():
        plain = arm.removesuffix("-AT")
        cells = [arm, str(len(seeds))]
        for results, key, digits in (
            (arms, "mse", 4),
            (arms, "at", 4),
            (arms, "linear_top1", 2),
            (arms, "knn_top1", 2),
            (scenes, "miou", 2),
        ):
            added = compared(results, arm, plain, lambda a, b, key=key: a[key] - b[key])
            how = f" ({interval(added, '', digits)})" if plain != arm and added else ""
            cells.append(mean(results.get(arm, {}), key, digits) + how)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *floor_lines(found)]


def floor_lines(found: dict[str, Any]) -> list[str]:
    """Return the attention loss of students with an MSE of 0, per tap."""
    if "attention-floor" not in found:
        return []
    floors = found["attention-floor"]
    lines = [
        "AT between the targets themselves and their raw maps, which is what a student of no MSE "
        "would have:",
        "",
    ]
    lines += [
        f"| whitening | {' | '.join(floors['sample'])} |",
        "|---" * (len(floors["sample"]) + 1) + "|",
    ]
    lines += [
        f"| {w} | {' | '.join(f'{value:.3f}' for value in floors[w].values())} |" for w in floors
    ]
    return [*lines, ""]


def mean(seeds: dict[str, Any], key: str, digits: int) -> str:
    """Return an arm's mean over seeds."""
    values: Sequence[float] = [result[key] for result in seeds.values()]
    return f"{statistics.mean(values):.{digits}f}" if values else "-"
