"""The speed of cached_vs_online.py: seconds per step from the cache, online and from memory, and
the share of waiting.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cached_vs_online_plan import Plan, extraction, online, training
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dtcache.cache.cache import TrainBatch
from dtcache.device import Compute, configure_process, resolve_compute
from dtcache.distributed import Processes
from dtcache.recipe import ViewSpec
from dtcache.student import build_student
from dtcache.teacher.ddpm import build_unet
from dtcache.teacher.denoiser import choose_taps
from dtcache.teacher.flops import count_flops
from dtcache.teacher.unet import UNetDenoiser
from pipelines.extract.extract import extract
from pipelines.runs.metrics import Clock
from pipelines.train.batch_source import BatchSource
from pipelines.train.cached_batches import CachedSource
from pipelines.train.online_batches import OnlineSource
from pipelines.train.trainer import Trainer, accumulate

ADM_CHANNELS = (256, 256, 512, 512, 1024, 1024)
WARM = 6
"""Steps before a block is timed: the loader is as far ahead then as when the block ends."""


def speed(plan: Plan, images: Path) -> None:
    """Time one extraction, and the blocks of the small and the large student."""
    cache = plan.work / "cache-speed"
    seconds = plan.results.once("extract", lambda: timed_extraction(plan, images, cache))
    assert seconds["images"] == plan.images, "the cache of another plan lies in --work"
    plan.results.once("projection", projection)
    for name in (plan.student, plan.large):
        plan.results.once(f"speed-{name}", lambda n=name: blocks(plan, images, cache, n))


def timed_extraction(plan: Plan, images: Path, cache: Path) -> dict[str, Any]:
    """Extract and return the wall seconds, including loading the teacher and fitting the codec."""
    shutil.rmtree(cache, ignore_errors=True)  # a resumed one would take less
    began = time.monotonic()
    extract(images, cache, extraction(plan))
    return {"seconds": time.monotonic() - began, "images": plan.images}


def projection() -> dict[str, int]:
    """Return the operations of a view: ADM's shape at 256 px up to stride 4, and a ResNet-50's
    training step on it.
    """
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
    """Random batches that lie decoded on the device: the speed limit of a student that waits for
    no data.
    """

    def __init__(self, like: BatchSource, batch_size: int, device: torch.device) -> None:
        shapes = {name: like.shape(name) for name in like.names}
        self.names = like.names
        self.view = like.view
        self.shape = like.shape
        self.num_batches = like.num_batches
        self.fit = {}
        self.recipe = {}
        self.labels = None
        self.label_decoder = None
        self.decoder = nn.Identity()
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


def blocks(plan: Plan, images: Path, cache: Path, name: str) -> dict[str, Any]:
    """Return seconds per step of every block by arm, and the cached arm's share of waiting."""
    compute = resolve_compute(plan.device, "auto")
    configure_process(compute.device)
    alone = Processes()
    options = replace(training(plan, 0, student=name), lr=1e-4)
    cached = CachedSource(cache, options, compute, alone)
    taught = OnlineSource(images, replace(options, **online(plan)), compute, alone)
    arms = {
        "limit": MemorySource(cached, plan.batch_size, compute.device),
        "cached": cached,
        "online": taught,
    }
    trainers = {arm: Trainer(source, options, compute, alone) for arm, source in arms.items()}
    seconds_per_step: dict[str, list[float]] = {arm: [] for arm in (*arms, "teacher", "waiting")}
    for _ in range(plan.rounds):
        for arm, trainer in trainers.items():
            seconds, share = block(plan, trainer, compute)
            seconds_per_step[arm].append(seconds)
            if arm == "cached":
                seconds_per_step["waiting"].append(share)
        seconds_per_step["teacher"].append(teacher_block(plan, taught, compute))
    return {**seconds_per_step, "steps_per_epoch": cached.num_batches}


def forever(source: Any) -> Iterator[Any]:
    """Yield batches, epoch after epoch."""
    for epoch in count():
        yield from source.epoch(epoch, 0)


def block(plan: Plan, trainer: Trainer, compute: Compute) -> tuple[float, float]:
    """Return seconds per step and the share of waiting, over one block in steady state."""
    with closing(forever(trainer.source)) as batches:
        for batch in islice(batches, WARM):
            step(trainer, batch)
        clock = Clock()
        for batch in clock.waiting(islice(batches, plan.steps)):
            step(trainer, batch)
        settle(compute)
        return clock.seconds / plan.steps, clock.share


def step(trainer: Trainer, batch: Any) -> None:
    """Take one step of a trainer, as a run of one student does."""
    accumulate(trainer.source, [trainer], [batch])
    trainer.update([batch])


def teacher_block(plan: Plan, source: OnlineSource, compute: Compute) -> float:
    """Return seconds per batch of the teacher's forward passes alone, with the inputs in memory."""
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
