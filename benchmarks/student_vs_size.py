"""Student quality against cache size: paired runs on caches 1 to 100 times smaller than fp16.

    python benchmarks/student_vs_size.py --train cifar10-train.parquet \
        --test cifar10-test.parquet --teacher DIR \
        --timestep T [--work runs/student_vs_size] [--device cuda --student resnet50 ...] \
        [--results DIR] [--table]

Quality is the whitened MSE on images that no cache held, against uncompressed targets, averaged
over taps; the attention loss and a linear probe are reported separately. Runs of one seed share
their starting weights, order and views, so that their differences are the codec's alone. Every run
writes its own JSON and a finished run is skipped: the table grows over interruptions. It is written
to docs/results/student_vs_size/NAME.md. --results and --work with empty folders measure everything
anew; results that other flags made are refused.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import Experiment, experiment_flags, parsed
from pages import about, write_lines
from paired import bounds, interval
from records import ROOT

from dtcache.cache.cache import Cache
from dtcache.device import Compute, resolve_compute
from dtcache.losses.objective import make_objective
from dtcache.options import EvaluateOptions, ExtractOptions, TrainOptions
from dtcache.store.summary import inspect_cache
from dtcache.student import Augmentation, Student, build_student
from pipelines.evaluate.classification import classify
from pipelines.extract.extract import extract
from pipelines.runs.checkpoint import load_checkpoint
from pipelines.train.distillation import DecodedBatch, Distillation, held_out_losses
from pipelines.train.train import train

ARMS = {"fp16": "fp16", "10x": "high", "50x": "default", "100x": "small"}
GOALS = {"50x": 1.0, "100x": 2.0}
"""Goal for the upper end of the interval of the MSE's rise, per cent."""
PROBE_GOAL = -1.0
"""Goal for the lower end of the interval of the linear probe's difference, points."""


def main() -> None:
    """Run what is not finished, then write the table."""
    parser = experiment_flags(
        __doc__.splitlines()[0], work=ROOT / "runs" / "student_vs_size", images=4000, epochs=12
    )
    asked, table_only = parsed(parser, "student_vs_size.py", ("--seeds",))
    plan = Experiment(**asked)
    if not table_only:
        run_all(plan)
    write_table(plan)


def run_all(plan: Experiment) -> None:
    """Extract every arm and the uncompressed reference, then train and judge seed by seed, so that
    pairs grow.
    """
    for arm, quality in ARMS.items():
        plan.results.once(f"cache-{arm}", lambda q=quality, a=arm: cache_of(plan, a, q))
    reference = plan.work / "reference"
    options = ExtractOptions(**common(plan), quality="fp16", flip=False, limit=plan.held_out)
    extract(plan.test, reference, options)
    for seed in range(plan.seeds):
        for arm in ARMS:
            plan.results.once(
                f"seed{seed}-{arm}", lambda a=arm, s=seed: judged(plan, a, s, reference)
            )
        write_table(plan)


def common(plan: Experiment) -> dict[str, Any]:
    """Return what all extractions share."""
    return {
        "teacher": plan.teacher,
        "timestep": (plan.timestep,),
        "batch_size": 64,
        "device": plan.device,
    }


def cache_of(plan: Experiment, arm: str, quality: str) -> dict[str, Any]:
    """Extract one arm's cache and return its size and taps."""
    out = plan.work / f"cache-{arm}"
    extract(plan.train, out, ExtractOptions(**common(plan), quality=quality, limit=plan.images))
    report = inspect_cache(out)
    return {key: report[key] for key in ("bytes_per_image", "ratio", "taps")}


def judged(plan: Experiment, arm: str, seed: int, reference: Path) -> dict[str, Any]:
    """Train one student and return its quality on images and targets that no cache held."""
    out = plan.work / f"run-{arm}-seed{seed}"
    options = plan.training(seed)
    train(plan.work / f"cache-{arm}", out, options)
    compute = resolve_compute(plan.device, "auto")
    losses = reference_losses(
        trained_student(plan, out, Cache(plan.work / f"cache-{arm}")), reference, options, compute
    )
    probe = EvaluateOptions(
        train=plan.train,
        test=plan.test,
        limit_train=plan.probe_images,
        device=plan.device,
        batch_size=256,
    )
    probed = classify(str(out / "backbone"), probe).rows[0]
    taps = Cache(reference).names
    curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "mse": statistics.mean(losses[f"mse/{name}"] for name in taps),
        "at": statistics.mean(losses[f"at/{name}"] for name in taps),
        "linear_top1": probed.linear_top1,
        "knn_top1": probed.knn_top1,
        "losses": losses,
        "held_out_curve": [line["held_out/loss"] for line in curve if "held_out/loss" in line],
        "images_per_second": json.loads((out / "summary.json").read_text())["images_per_second"],
    }


def trained_student(plan: Experiment, out: Path, cache: Cache) -> Student:
    """Return the student of a finished run, its regressor included."""
    shapes = {name: cache.shape(name) for name in cache.names}
    size = (plan.student_size, plan.student_size)
    student = build_student(
        plan.student, shapes, cache.view, size=size, width=plan.fpn_width, init=None, seed=0
    )
    state = load_checkpoint(out)
    assert state is not None, "a finished run keeps its checkpoint"
    student.load_state_dict(state["student"])
    return student


def reference_losses(
    student: Student, reference: Path, options: TrainOptions, compute: Compute
) -> dict[str, float]:
    """Return the losses against uncompressed targets, mean over all images of the reference."""
    cache = Cache(reference)
    decoder = cache.decoder(cache.names).to(compute.device)
    shapes = {name: cache.shape(name) for name in cache.names}
    student = student.to(compute.device).to(memory_format=torch.channels_last)
    distillation = Distillation(
        objective=make_objective(options, cache.fit, cache.reader.manifest.recipe["codec"], shapes),
        augmentation=Augmentation(seed=0),
        input_size=student.input_size,
        whitening=options.whitening,
        compute=compute,
    )
    rows = cache.reader.usable_rows
    parts = np.split(rows, range(options.batch_size, len(rows), options.batch_size))
    batches = (
        DecodedBatch(
            cache.batch(part, [0] * len(part), cache.names).changed(lambda x: x.to(compute.device)),
            decoder,
        )
        for part in parts
    )
    return held_out_losses(batches, [(distillation, student)])[0]


def write_table(plan: Experiment) -> None:
    """Write the page of one experiment from the results that are there."""
    found = plan.results.read()
    runs = {name: record["result"] for name, record in found.items() if name.startswith("seed")}
    seeds = sorted({name.split("-")[0] for name in runs})
    rows = [
        "| cache | bytes per image | ratio | MSE | MSE, paired | AT, paired | linear probe | "
        "paired, points | goal |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for arm in ARMS:
        pairs = [
            (runs[f"{s}-fp16"], runs[f"{s}-{arm}"])
            for s in seeds
            if {f"{s}-fp16", f"{s}-{arm}"} <= set(runs)
        ]
        if pairs and f"cache-{arm}" in found:
            rows.append(table_row(arm, found[f"cache-{arm}"]["result"], pairs))
    text = [
        f"# Student quality against cache size: {plan.name}",
        "",
        f"{plan.student} at {plan.student_size} px, fpn-width {plan.fpn_width}, {plan.epochs} "
        f"epochs of {plan.images} "
        f"images (both flips cached), batch {plan.batch_size}, t = {plan.timestep}; {len(seeds)} "
        f"seeds, paired: the "
        "same weights, order and views at the start. MSE and AT against the uncompressed features "
        "of "
        f"{plan.held_out} test images, mean over taps; differences from the fp16 arm of the same "
        f"seed with their 95 % "
        "interval (Student's t).",
        "",
        *rows,
        "",
        *about(found),
    ]
    write_lines(plan.results.folder.parent / f"{plan.name}.md", text)


def table_row(
    arm: str, cost: dict[str, Any], pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]
) -> str:
    """Return one arm's line."""
    mse = [100 * (b["mse"] / a["mse"] - 1) for a, b in pairs]
    at = [100 * (b["at"] / a["at"] - 1) for a, b in pairs]
    probe = [b["linear_top1"] - a["linear_top1"] for a, b in pairs]
    level, accuracy = (statistics.mean(b[key] for _, b in pairs) for key in ("mse", "linear_top1"))
    cells = [
        arm,
        f"{cost['bytes_per_image']:.0f}",
        f"{cost['ratio']:.1f}",
        f"{level:.4f}",
        interval(mse, "%"),
        interval(at, "%"),
        f"{accuracy:.2f}",
        interval(probe, ""),
        verdict(arm, mse, probe),
    ]
    return f"| {' | '.join(cells)} |"


def verdict(arm: str, mse: Sequence[float], probe: Sequence[float]) -> str:
    """Return met, missed or undecided: an interval on both sides of the goal decides nothing."""
    if arm not in GOALS:
        return "-"
    _, mse_low, mse_high = bounds(mse)
    _, probe_low, probe_high = bounds(probe)
    if mse_high <= GOALS[arm] and probe_low >= PROBE_GOAL:
        return "met"
    return "missed" if mse_low > GOALS[arm] or probe_high < PROBE_GOAL else "undecided"


if __name__ == "__main__":
    main()
