"""A student from the cache beside one with the teacher in its loop: speed, quality, waiting, whitening.

    python benchmarks/cached_vs_online.py --train cifar10-train.parquet --test cifar10-test.parquet --teacher DIR \
        --timestep T [--parts speed,quality,whitening] [--work runs/cached_vs_online] [--device cuda ...] [--table]

Speed (and waiting): seconds a step of one student from the cache, with the teacher in the loop, and on random tensors
that lie on the device already, which is the limit. Blocks of steps alternate; ratios are medians over paired blocks.
Quality: arms see each of a few training images in every one of many epochs, because only then can frozen noise show.
Online noise is fresh; caches hold 1, 2 or 4 draws as views, or the mean of 4. Every seed has caches of its own, so that
arms of one seed share weights, order, flips and the noise of draw 0. Losses are against the mean of 16 fresh draws of
images that no arm saw. Whitening: {a sample, a position} x {MSE, MSE + 10 AT} on float16 caches, each judged in its own
unit. Every measurement is a JSON of its own, and a finished one is skipped. Tables: cached_vs_online/NAME.md.
"""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cached_vs_online_tables import write_tables
from experiment import Experiment, experiment_flags
from records import ROOT, once
from student_vs_size import reference_losses
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dtcache.cache import Cache, TrainBatch
from dtcache.device import Compute, resolve_compute
from dtcache.images import open_source, permuted
from dtcache.objective import make_objective
from dtcache.options import EvaluateOptions, ExtractOptions, TrainOptions
from dtcache.spec import ViewSpec
from dtcache.student import Student, Views, build_student
from dtcache.teacher.build import build_unet
from dtcache.teacher.denoiser import choose_taps
from dtcache.teacher.unet import UNetDenoiser
from pipelines.distill import Distillation, train_step
from pipelines.evaluate import evaluate
from pipelines.extract import extract
from pipelines.learner import Learner
from pipelines.online import OnlineSource
from pipelines.processes import Processes
from pipelines.report import inspect_cache
from pipelines.run import Clock, load_checkpoint
from pipelines.sources import BatchSource, CachedSource
from pipelines.teacher import count_flops
from pipelines.train import train

RESULTS = ROOT / "docs" / "results" / "cached_vs_online"
DRAWS: dict[str, dict[str, Any]] = {
    "1 draw": {"draws": 1},
    "2 draws": {"draws": 2},
    "4 draws": {"draws": 4},
    "mean of 4": {"draws": 4, "average": True},
}
WHITENINGS = {
    f"{w}, {name}": (w, at) for w in ("sample", "position") for name, at in (("MSE", 0.0), ("MSE + AT", 10.0))
}
ADM_CHANNELS = (256, 256, 512, 512, 1024, 1024)
WARM = 6
"""Steps before a block is timed: the loader is as far ahead then as when the block ends."""


@dataclass(frozen=True, kw_only=True)
class Plan(Experiment):
    """The experiment, and what its speed is measured with."""

    parts: str
    large: str
    rounds: int
    steps: int
    compile: bool

    @property
    def results(self) -> Path:
        return RESULTS / self.name

    @property
    def command(self) -> str:
        return self.shown("cached_vs_online.py")


def main() -> None:
    """Run what is not finished, then write the tables."""
    plan, table_only = parse()
    if not table_only:
        images = subset(plan)
        for part in plan.parts.split(","):
            {"speed": speed, "quality": quality, "whitening": whitening}[part](plan, images)
    write_tables(plan.results)


def parse() -> tuple[Plan, bool]:
    """Return the plan and whether only the tables are asked for."""
    parser = experiment_flags(__doc__.splitlines()[0], work=ROOT / "runs" / "cached_vs_online", images=2000, epochs=60)
    parser.add_argument("--parts", default="speed,quality,whitening")
    parser.add_argument("--large", default="resnet50", help="the other student of the waiting")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each arm of the speed")
    parser.add_argument("--steps", type=int, default=20, help="steps of a block")
    parser.add_argument("--compile", action="store_true", help="compile the teacher, online and in extractions")
    asked = vars(parser.parse_args())
    table_only = asked.pop("table")
    return Plan(**asked), table_only


def subset(plan: Plan) -> Path:
    """Write the training images as files of their own, so that every seed, online or cached, has the same ones."""
    source, out = open_source(plan.train), plan.work / f"images-{plan.images}"
    out.mkdir(parents=True, exist_ok=True)
    for index in permuted(len(source.keys), seed=0, stream="subset")[: plan.images].tolist():
        path = out / f"{index:08d}.png"
        if not path.exists():
            path.write_bytes(source.read(index))
    return out


def extraction(plan: Plan, **chosen: Any) -> ExtractOptions:
    """Return the options that extractions share, and some of their own."""
    common = ExtractOptions(
        teacher=plan.teacher, timestep=(plan.timestep,), batch_size=64, device=plan.device, compile=plan.compile
    )
    return replace(common, **chosen)


def training(plan: Plan, seed: int, **chosen: Any) -> TrainOptions:
    """Return the options that trainings share, and some of their own."""
    return replace(plan.training(seed), **chosen)


def online(plan: Plan) -> dict[str, Any]:
    """Return what puts the teacher into the loop."""
    return {"online": True, "teacher": plan.teacher, "timestep": plan.timestep, "compile": plan.compile}


# --- speed and waiting


def speed(plan: Plan, images: Path) -> None:
    """Time one extraction, and the blocks of the small and the large student."""
    cache = plan.work / "cache-speed"
    seconds = once(plan.results / "extract.json", plan.command, lambda: timed_extraction(plan, images, cache))
    assert seconds["images"] == plan.images, "the cache of another plan lies in --work"
    once(plan.results / "projection.json", plan.command, projection)
    for name in (plan.student, plan.large):
        once(plan.results / f"speed-{name}.json", plan.command, lambda n=name: blocks(plan, images, cache, n))


def timed_extraction(plan: Plan, images: Path, cache: Path) -> dict[str, Any]:
    """Extract and return the seconds of it, loading the teacher, fit and all."""
    began = time.monotonic()
    extract(images, cache, extraction(plan))
    return {"seconds": time.monotonic() - began, "images": plan.images}


def projection() -> dict[str, int]:
    """Return the operations of a view: ADM's shape at 256 px up to stride 4, and a ResNet-50's training step on it."""
    with torch.device("meta"):
        denoiser = UNetDenoiser(build_unet(256, 256, ADM_CHANNELS, layers=2, attention=3))
    taps = choose_taps(denoiser.find_taps(256, 256), ("stride4", "stride8", "stride16", "stride32"))
    shapes = {tap.name: (tap.channels, tap.height, tap.width) for tap in taps}
    view = ViewSpec(height=256, width=256)
    student = build_student("resnet50", shapes, view, size=(256, 256), width=256, init=None, seed=0).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        student(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    teacher = count_flops(denoiser.tapped(taps), (3, 256, 256), None)
    return {"teacher": teacher, "student": 3 * int(counter.get_total_flops())}


class MemorySource:
    """Random batches that lie decoded on the device: what a student could do if nothing had to be fetched."""

    def __init__(self, like: BatchSource, batch_size: int, device: torch.device) -> None:
        shapes = {name: like.shape(name) for name in like.names}
        self.decoder = nn.Identity()
        self._batch = TrainBatch(
            rows=np.arange(batch_size),
            images_BCHW=torch.randint(0, 256, (batch_size, 3, like.view.height, like.view.width), dtype=torch.uint8),
            coefficients={name: torch.randn(batch_size, *shape) for name, shape in shapes.items()},
            scalars={name: torch.tensor([[1.0, 0.0]]).repeat(batch_size, 1) for name in shapes},
        ).changed(lambda x: x.to(device))

    def epoch(self, epoch: int, start: int) -> Iterator[TrainBatch]:
        while True:
            yield self._batch

    def ready(self, batch: TrainBatch) -> TrainBatch:
        return batch


def blocks(plan: Plan, images: Path, cache: Path, name: str) -> dict[str, Any]:
    """Return seconds a step of every block by arm, and the share of the cached arm's time that went to waiting."""
    compute, alone = resolve_compute(plan.device, "auto"), Processes()
    options = training(plan, 0, student=name)
    cached = CachedSource(cache, options, compute, alone)
    taught = OnlineSource(images, replace(options, **online(plan)), compute, alone)
    arms = {"limit": MemorySource(cached, plan.batch_size, compute.device), "cached": cached, "online": taught}
    student = new_student(plan, name, {n: cached.shape(n) for n in cached.names}, cached)
    learner = Learner(student, options, 1e-4, compute, alone)
    objective = make_objective(options, cached.fit, cached.recipe["codec"], cached.names).to(compute.device)
    found: dict[str, list[float]] = {arm: [] for arm in (*arms, "teacher", "waiting")}
    for _ in range(plan.rounds):
        for arm, source in arms.items():
            distillation = Distillation(
                decoder=source.decoder,
                objective=objective,
                views=Views(crop=None, jitter=0.0, seed=0),
                input_size=student.input_size,
                whitening=options.whitening,
                compute=compute,
            )
            seconds, share = block(plan, learner, distillation, source, options)
            found[arm].append(seconds)
            if arm == "cached":
                found["waiting"].append(share)
        found["teacher"].append(teacher_block(plan, taught, compute))
    return {**found, "steps_per_epoch": cached.num_batches}


def forever(source: Any) -> Iterator[Any]:
    """Yield batches, epoch after epoch."""
    for epoch in count():
        yield from source.epoch(epoch, 0)


def block(
    plan: Plan, learner: Learner, distillation: Distillation, source: Any, options: TrainOptions
) -> tuple[float, float]:  # fmt: skip
    """Return seconds a step and the share of waiting, over one block in steady state."""
    with closing(forever(source)) as batches:
        for batch in islice(batches, WARM):
            train_step(learner, distillation, source, [batch], 0, 1e-4, options, Processes())
        clock = Clock()
        for batch in clock.waiting(islice(batches, plan.steps)):
            train_step(learner, distillation, source, [batch], 0, 1e-4, options, Processes())
        settle(distillation.compute)
        return clock.seconds / plan.steps, clock.share


def teacher_block(plan: Plan, source: OnlineSource, compute: Compute) -> float:
    """Return seconds a batch of the teacher's passes alone, its inputs being there."""
    with closing(forever(source)) as batches:
        batch = next(batches)
    source.ready(batch)
    settle(compute)
    began = time.monotonic()
    for _ in range(plan.steps):
        source.ready(batch)
    settle(compute)
    return (time.monotonic() - began) / plan.steps


def settle(compute: Compute) -> None:
    """Wait for the device."""
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)


# --- quality and whitening


def quality(plan: Plan, images: Path) -> None:
    """Train every arm of a seed, then the next seed, so that pairs grow."""
    for seed in range(plan.seeds):
        for arm, draws in DRAWS.items():
            name = arm.replace(" ", "-")
            cache = plan.work / f"cache-{name}-seed{seed}"

            def cached(cache: Path = cache, draws: dict[str, Any] = draws, seed: int = seed) -> dict[str, Any]:
                extract(images, cache, extraction(plan, seed=seed, **draws))
                judged = trained(plan, cache, f"{cache.name}-run", training(plan, seed))
                return {**judged, "bytes_per_image": inspect_cache(cache)["bytes_per_image"]}

            once(plan.results / f"quality-seed{seed}-{name}.json", plan.command, cached)
        options = training(plan, seed, **online(plan))
        path = plan.results / f"quality-seed{seed}-online.json"
        once(path, plan.command, lambda o=options, s=seed: trained(plan, images, f"online-seed{s}-run", o))
        write_tables(plan.results)


def whitening(plan: Plan, images: Path) -> None:
    """Train the 2x2 of whitening and attention loss on float16 caches."""
    for seed in range(plan.seeds):
        cache = plan.work / f"cache-fp16-seed{seed}"
        extract(images, cache, extraction(plan, seed=seed, quality="fp16"))
        for arm, (kind, weight) in WHITENINGS.items():
            name = arm.replace(", ", "-").replace(" + ", "-").replace(" ", "-")
            options = training(plan, seed, whitening=kind, at_weight=weight)
            path = plan.results / f"whitening-seed{seed}-{name}.json"
            once(path, plan.command, lambda c=cache, n=name, o=options: trained(plan, c, f"{c.name}-{n}-run", o))
        write_tables(plan.results)


def trained(plan: Plan, where: Path, run: str, options: TrainOptions) -> dict[str, Any]:
    """Train one student and return its losses on unseen images against the mean of many draws, and its probes."""
    out, reference = plan.work / run, plan.work / "reference"
    train(where, out, options)
    extract(
        plan.test, reference, extraction(plan, quality="fp16", flip=False, draws=16, average=True, limit=plan.held_out)
    )
    compute, cache = resolve_compute(plan.device, "auto"), Cache(reference)
    student = new_student(plan, options.student, {n: cache.shape(n) for n in cache.names}, cache)
    state = load_checkpoint(out)
    assert state is not None, "a finished run keeps its checkpoint"
    student.load_state_dict(state["student"])
    found = reference_losses(student, reference, options, compute)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    probe = EvaluateOptions(
        train=plan.train, test=plan.test, limit_train=plan.probe_images, device=plan.device, batch_size=256
    )
    probed = evaluate(str(out / "backbone"), probe)[0]
    return {
        "mse": statistics.mean(found[f"mse/{name}"] for name in cache.names),
        "at": statistics.mean(found[f"at/{name}"] for name in cache.names),
        "train_loss": statistics.mean(losses[-10:]),
        "own_held_out": json.loads((out / "summary.json").read_text())["held_out"]["loss"],
        "linear_top1": probed.linear_top1,
        "knn_top1": probed.knn_top1,
        "losses": found,
    }


def new_student(plan: Plan, name: str, shapes: dict[str, tuple[int, int, int]], like: Any) -> Student:
    """Return an untrained student of a plan."""
    size = (plan.student_size, plan.student_size)
    return build_student(name, shapes, like.view, size=size, width=plan.fpn_width, init=None, seed=0)


if __name__ == "__main__":
    main()
