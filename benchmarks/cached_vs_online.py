"""A student from the cache beside one with the teacher in its loop: speed, quality, waiting, noise,
whitening.

    python benchmarks/cached_vs_online.py --train cifar10-train.parquet \
        --test cifar10-test.parquet --teacher DIR \
        --timestep T [--parts speed,quality,noise,whitening] [--work DIR] [--results DIR] \
        [--device cuda ...] ...

Speed (and waiting): seconds per step of one student from the cache, with the teacher in the loop,
and on random tensors that lie on the device already, which is the limit. Blocks of steps alternate;
ratios are medians over paired blocks. Quality: arms see each of a few training images in every one
of many epochs, because only then can frozen noise show. Online noise is fresh; caches hold 1, 2 or
4 draws as views, or the mean of 4, 50 times smaller than fp16, and 2 draws at 100 times, which take
the bytes of 1 at 50. Every seed has caches of its own, so that arms of one seed share weights,
order, flips and the noise of draw 0. Losses are against the mean of 16 fresh draws of images that
no arm saw; backbones also segment scenes, frozen, under a linear head. Noise: one draw with
--noise-weighting. Whitening: {per sample, per position} x {MSE, MSE + 10 AT} on float16 caches,
each judged in its own unit. Every measurement is a JSON of its own, and a finished one is skipped.
Tables: docs/results/students.md. --results and --work with empty folders measure everything anew;
the script refuses results that were made with other flags.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cached_vs_online_plan import Plan, extraction, new_student, online, parse, subset, training
from cached_vs_online_speed import speed
from cached_vs_online_tables import write_tables
from student_vs_size import reference_losses

from dtcache.cache.cache import Cache
from dtcache.device import resolve_compute
from dtcache.images.scenes import write_scenes
from dtcache.losses.features import at_loss
from dtcache.options import EvaluateOptions, TrainOptions
from dtcache.store.summary import inspect_cache
from dtcache.whitening import unwhiten, whiten_positions
from pipelines.evaluate.classification import classify
from pipelines.evaluate.segmentation import segment
from pipelines.extract.extract import extract
from pipelines.runs.checkpoint import load_checkpoint
from pipelines.train.train import train

DRAWS: dict[str, dict[str, Any]] = {
    "1 draw": {"draws": 1},
    "2 draws": {"draws": 2},
    "2 draws, 100x": {"draws": 2, "quality": "small"},
    "4 draws": {"draws": 4},
    "mean of 4": {"draws": 4, "average": True},
}
WHITENINGS = {
    f"{w}, {name}": (w, at)
    for w in ("sample", "position")
    for name, at in (("MSE", 0.0), ("MSE + AT", 10.0))
}
SCENES_SIZE = 64
SCENES_EPOCHS = 15


def main() -> None:
    """Run what is not finished, then write the tables."""
    plan, table_only = parse(__doc__.splitlines()[0])
    if not table_only:
        images = subset(plan)
        parts = {"speed": speed, "quality": quality, "noise": noise, "whitening": whitening}
        for part in plan.parts.split(","):
            parts[part](plan, images)
    write_tables(plan.results)


def quality(plan: Plan, images: Path) -> None:
    """Train every arm of a seed, then the next seed, so that pairs grow."""
    for seed in range(plan.seeds):
        for arm, draws in DRAWS.items():
            name = arm.replace(", ", "-").replace(" ", "-")
            cache = plan.work / f"cache-{name}-seed{seed}"

            def cached(
                cache: Path = cache, draws: dict[str, Any] = draws, seed: int = seed
            ) -> dict[str, Any]:
                extract(images, cache, extraction(plan, seed=seed, **draws))
                found = trained(plan, cache, f"{cache.name}-run", training(plan, seed))
                return {**found, "bytes_per_image": inspect_cache(cache)["bytes_per_image"]}

            judged(plan, f"quality-seed{seed}-{name}", f"{cache.name}-run", cached)
        options = training(plan, seed, **online(plan))
        run = f"online-seed{seed}-run"
        judged(
            plan,
            f"quality-seed{seed}-online",
            run,
            lambda o=options, r=run: trained(plan, images, r, o),
        )
        write_tables(plan.results)


def noise(plan: Plan, images: Path) -> None:
    """Train the arm of one draw again, with `noise_weighting`."""
    for seed in range(plan.seeds):
        cache = plan.work / f"cache-1-draw-seed{seed}"
        options = training(plan, seed, noise_weighting=True)
        extract(images, cache, extraction(plan, seed=seed, draws=1))
        run = f"{cache.name}-noise-weighted-run"
        judged(
            plan,
            f"noise-seed{seed}-weighted",
            run,
            lambda c=cache, r=run, o=options: trained(plan, c, r, o),
        )
        write_tables(plan.results)


def whitening(plan: Plan, images: Path) -> None:
    """Train the 2x2 of whitening and attention loss on float16 caches."""
    extract_reference(plan)
    plan.results.once("attention-floor", lambda: attention_floor(plan))
    for seed in range(plan.seeds):
        cache = plan.work / f"cache-fp16-seed{seed}"
        extract(images, cache, extraction(plan, seed=seed, quality="fp16"))
        for arm, (kind, weight) in WHITENINGS.items():
            name = arm.replace(", ", "-").replace(" + ", "-").replace(" ", "-")
            options = training(plan, seed, whitening=kind, at_weight=weight)
            run = f"{cache.name}-{name}-run"
            judged(
                plan,
                f"whitening-seed{seed}-{name}",
                run,
                lambda c=cache, r=run, o=options: trained(plan, c, r, o),
            )
        write_tables(plan.results)


def extract_reference(plan: Plan) -> Path:
    """Extract the mean of many draws of images that no arm sees, and return where it is."""
    reference = plan.work / "reference"
    limit = plan.held_out
    extract(
        plan.test,
        reference,
        extraction(plan, quality="fp16", flip=False, draws=16, average=True, limit=limit),
    )
    return reference


def attention_floor(plan: Plan) -> dict[str, dict[str, float]]:
    """Return AT between targets of either whitening and their own raw maps: a student of perfect
    MSE has that much.
    """
    cache = Cache(plan.work / "reference")
    rows = np.arange(min(256, plan.held_out))
    batch = cache.batch(rows, np.zeros_like(rows), cache.names)
    found: dict[str, dict[str, float]] = {"sample": {}, "position": {}}
    for name, whitened_BCHW in cache.decoder(cache.names)(batch.coefficients).items():
        raw_BCHW = unwhiten(whitened_BCHW, batch.scalars[name])
        found["sample"][name] = float(at_loss(whitened_BCHW, raw_BCHW))
        found["position"][name] = float(at_loss(whiten_positions(raw_BCHW), raw_BCHW))
    return found


def judged(plan: Plan, name: str, run: str, train_it: Callable[[], dict[str, Any]]) -> None:
    """Train one student and judge it, and its backbone by segmentation of scenes too, where that is
    not done yet.
    """
    plan.results.once(name, train_it)
    plan.results.once(f"scenes-{name}", lambda: segmented(plan, plan.work / run / "backbone"))


def segmented(plan: Plan, backbone: Path) -> dict[str, Any]:
    """Return the scores of a linear segmentation head on a frozen backbone's maps of scenes."""
    sides = {}
    for seed, side in enumerate(("train", "test")):
        root = plan.work / f"scenes-{side}"
        write_scenes(root, seed=seed, size=SCENES_SIZE, count=plan.scenes)
        sides |= {side: root / "images", f"{side}_masks": root / "masks"}
    options = EvaluateOptions(
        task="segmentation",
        size=str(SCENES_SIZE),
        epochs=SCENES_EPOCHS,
        device=plan.device,
        **sides,
    )
    return segment(str(backbone), options).to_json()


def trained(plan: Plan, where: Path, run: str, options: TrainOptions) -> dict[str, Any]:
    """Train one student and return its losses on unseen images against the mean of many draws, and
    its probes.
    """
    out = plan.work / run
    reference = extract_reference(plan)
    train(where, out, options)
    compute = resolve_compute(plan.device, "auto")
    cache = Cache(reference)
    student = new_student(plan, options.student, {n: cache.shape(n) for n in cache.names}, cache)
    state = load_checkpoint(out)
    assert state is not None, "a finished run keeps its checkpoint"
    student.load_state_dict(state["student"])
    found = reference_losses(student, reference, options, compute)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    probe = EvaluateOptions(
        train=plan.train,
        test=plan.test,
        limit_train=plan.probe_images,
        device=plan.device,
        batch_size=256,
    )
    probed = classify(str(out / "backbone"), probe).rows[0]
    return {
        "mse": statistics.mean(found[f"mse/{name}"] for name in cache.names),
        "at": statistics.mean(found[f"at/{name}"] for name in cache.names),
        "train_loss": statistics.mean(losses[-10:]),
        "own_held_out": json.loads((out / "summary.json").read_text())["held_out"]["loss"],
        "linear_top1": probed.linear_top1,
        "knn_top1": probed.knn_top1,
        "losses": found,
    }


if __name__ == "__main__":
    main()
