"""Seconds per training step: from a cache, with the teacher in the loop, and from memory.

    python benchmarks/training_step.py --images cifar10-train.parquet --teacher DIR --timestep 20 \
        [--limit 1000] [--students resnet10t,resnet50] [--rounds 5] [--steps 20] [--compile] [...]

Memory is the limit: random batches that lie decoded on the device. In every round each arm takes
one block of steps, and the teacher alone takes a block of forward passes. Ratios are medians over
rounds. Waiting is the share of the cached blocks in which the student had no batch. The extraction
is timed once.
Results: docs/results/training_step.json.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import results_flag, write
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dtcache.cache.cache import TrainBatch
from dtcache.device import Compute, resolve_compute
from dtcache.distributed import Processes
from dtcache.options import ExtractOptions, TrainOptions
from dtcache.process_settings import configure_process
from dtcache.recipe import ViewSpec
from dtcache.student import build_student
from dtcache.teacher.ddpm import build_unet
from dtcache.teacher.denoiser import choose_taps
from dtcache.teacher.flops import count_flops
from dtcache.teacher.unet import UNetDenoiser
from pipelines.extract.extract import extract
from pipelines.runs.clock import Clock
from pipelines.train.batch_source import BatchSource
from pipelines.train.cached_batches import CachedSource
from pipelines.train.online_batches import OnlineSource
from pipelines.train.trainer import Trainer, accumulate

ADM_CHANNELS = (256, 256, 512, 512, 1024, 1024)
WARM_UP = 6
"""Steps before a block is timed: the loader is as far ahead then as when the block ends."""


def main() -> None:
    """Measure, print the ratios, and record them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--timestep", type=int, required=True)
    parser.add_argument("--limit", type=int, default=1000, help="images of the cache")
    parser.add_argument("--students", default="resnet10t,resnet50")
    parser.add_argument("--student-size", default="32")
    parser.add_argument("--fpn-width", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps per block")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=Path("runs/training_step"))
    results_flag(parser)
    args = parser.parse_args()
    started = time.time()
    compute = resolve_compute(args.device, "auto")
    configure_process(compute.device)
    cache = args.work / "cache"
    result: dict[str, Any] = {
        "extraction": timed_extraction(args, cache),
        "projection": projection(),
        "students": {
            name: summary(blocks(args, cache, name, compute)) for name in args.students.split(",")
        },
    }
    for name, student in result["students"].items():
        ratios = ", ".join(f"{key} {value:.3f}" for key, value in student["ratios"].items())
        print(f"{name}: {ratios}")
    shown = {"images": "IMAGES", "teacher": "TEACHER"}
    hidden = ("work", "results", "compile")
    words = [
        f"--{name.replace('_', '-')} {shown.get(name, value)}"
        for name, value in vars(args).items()
        if name not in hidden
    ]
    command = " ".join(["python benchmarks/training_step.py", *words])
    write(
        args.results / "training_step.json",
        command + " --compile" * args.compile,
        result,
        time.time() - started,
    )


def timed_extraction(args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Extract; return the wall seconds, including loading the teacher and fitting the codec."""
    shutil.rmtree(cache, ignore_errors=True)  # a resumed extraction would take less
    began = time.monotonic()
    options = ExtractOptions(
        teacher=args.teacher,
        timestep=(args.timestep,),
        batch_size=64,
        limit=args.limit,
        device=args.device,
        compile=args.compile,
    )
    extract(args.images, cache, options)
    return {"seconds": time.monotonic() - began, "images": args.limit}


def summary(blocks: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians over rounds, and medians of the ratios within each round."""

    def ratio(arm: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(blocks[arm], blocks[base], strict=True))

    return {
        "seconds_per_step": {arm: statistics.median(values) for arm, values in blocks.items()},
        "ratios": {
            "cached over online": ratio("cached", "online"),
            "cached over memory": ratio("cached", "memory"),
            "waiting share": statistics.median(blocks["waiting"]),
        },
        "blocks": blocks,
    }


def projection() -> dict[str, int]:
    """Return FLOPs per view: ADM-256 up to stride 4, and a training step of a ResNet-50."""
    with torch.device("meta"):
        denoiser = UNetDenoiser(build_unet(256, 256, ADM_CHANNELS, layers=2, attention=3))
    taps = choose_taps(denoiser.find_taps(256, 256), ("stride4", "stride8", "stride16", "stride32"))
    shapes = {tap.name: (tap.channels, tap.height, tap.width) for tap in taps}
    view = ViewSpec(height=256, width=256)
    student = build_student(
        "resnet50", shapes, view, size=(256, 256), width=256, init=None, seed=0
    ).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        student(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    teacher = count_flops(denoiser.tapped(taps), (3, 256, 256), None)
    return {"teacher": teacher, "student": 3 * int(counter.get_total_flops())}


class MemorySource:
    """One random batch that lies decoded on the device: the limit of a student without waiting."""

    def __init__(self, like: BatchSource, batch_size: int, device: torch.device) -> None:
        shapes = {name: like.shape(name) for name in like.names}
        self.names = like.names
        self.view = like.view
        self.shape = like.shape
        self.num_batches = like.num_batches
        self.teachers = like.teachers
        self.labels = None
        self.label_decoder = None
        self._batch = TrainBatch(
            rows=np.arange(batch_size),
            images_BCHW=torch.randint(
                0, 256, (batch_size, 3, like.view.height, like.view.width), dtype=torch.uint8
            ),
            coefficients={name: torch.randn(batch_size, *shape) for name, shape in shapes.items()},
            scalars={name: torch.tensor([[1.0, 0.0]]).repeat(batch_size, 1) for name in shapes},
        ).changed(lambda x: x.to(device))

    def epoch(self, epoch: int, start: int) -> Iterator[TrainBatch]:
        while True:
            yield self._batch

    def ready(self, batch: TrainBatch) -> TrainBatch:
        return batch

    def decode(self, batch: TrainBatch) -> dict[str, Tensor]:
        return batch.coefficients


def blocks(
    args: argparse.Namespace, cache: Path, name: str, compute: Compute
) -> dict[str, list[float]]:
    """Return seconds per step of every block by arm, and the cached arm's share of waiting."""
    alone = Processes()
    options = TrainOptions(
        student=name,
        student_size=args.student_size,
        fpn_width=args.fpn_width,
        batch_size=args.batch_size,
        limit=args.limit,
        lr=1e-4,
        device=args.device,
        compile=args.compile,
    )
    cached = CachedSource([cache], options, compute, alone)
    in_loop = replace(options, teacher=args.teacher, timestep=args.timestep)
    online = OnlineSource(args.images, in_loop, compute, alone)
    arms = {
        "memory": MemorySource(cached, args.batch_size, compute.device),
        "cached": cached,
        "online": online,
    }
    trainers = {arm: Trainer(source, options, compute, alone) for arm, source in arms.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in (*arms, "teacher", "waiting")}
    for _ in range(args.rounds):
        for arm, trainer in trainers.items():
            per_step, share = block(args.steps, trainer, compute)
            seconds[arm].append(per_step)
            if arm == "cached":
                seconds["waiting"].append(share)
        seconds["teacher"].append(teacher_block(args.steps, online, compute))
    return seconds


def forever(source: Any) -> Iterator[Any]:
    """Yield batches, epoch after epoch."""
    for epoch in count():
        yield from source.epoch(epoch, 0)


def block(steps: int, trainer: Trainer, compute: Compute) -> tuple[float, float]:
    """Return seconds per step and the share of waiting, over one block in steady state."""
    with closing(forever(trainer.source)) as batches:
        for batch in islice(batches, WARM_UP):
            step(trainer, batch)
        clock = Clock()
        for batch in clock.waiting(islice(batches, steps)):
            step(trainer, batch)
        settle(compute)
        return clock.seconds / steps, clock.share


def step(trainer: Trainer, batch: Any) -> None:
    """Take one step of a trainer, as a run of one student does."""
    accumulate(trainer.source, [trainer], [batch])
    trainer.update([batch])


def teacher_block(steps: int, source: OnlineSource, compute: Compute) -> float:
    """Return seconds per batch of the teacher's forward passes alone, with the inputs in memory."""
    with closing(forever(source)) as batches:
        batch = next(batches)
    source.ready(batch)
    settle(compute)
    began = time.monotonic()
    for _ in range(steps):
        source.ready(batch)
    settle(compute)
    return (time.monotonic() - began) / steps


def settle(compute: Compute) -> None:
    """Wait for the device."""
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)


if __name__ == "__main__":
    main()
