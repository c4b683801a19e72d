"""Stage 2: a student regresses the cached features of a teacher that is not there any more."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dtcache.cache import Cache, TrainBatch
from dtcache.device import resolve_compute
from dtcache.errors import ConfigError, TrainingError
from dtcache.loader import EpochLoader
from dtcache.objective import make_objective
from dtcache.options import TrainOptions, parse_size, parse_taps
from dtcache.spec import tap_name
from dtcache.storage import FolderLock, disk_errors, write_file
from dtcache.store.layout import IMAGES, SAMPLES
from dtcache.store.samples import held_out
from dtcache.student import Student, Views, build_student, make_optimizer, save_backbone
from pipelines.distill import Distillation, held_out_losses, remarks, train_step
from pipelines.plots import plot_curves
from pipelines.progress import track
from pipelines.run import Clock, MetricsFile, claim_run, load_checkpoint, save_checkpoint
from pipelines.schedule import warmup_cosine

VOLATILE = ("images", "device", "threads", "save_every", "log_every")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a finished run left behind."""

    out: Path
    steps: int
    held_out_loss: float
    wait_share: float


def train(cache_root: Path, out: Path, options: TrainOptions) -> Trained:
    """Train a student on a sealed cache and export its backbone; resumes a run in `out` made with the same options.

    Raises TrainingError where the loss is not finite, naming the samples, and what its parts raise.
    """
    cache = Cache(cache_root, options.images)
    if options.whitening == "position" and cache.reader.manifest.recipe["codec"]["name"] != "float16":
        raise ConfigError("--whitening position: expected a cache of --quality fp16, whose features are exact")
    if IMAGES not in cache.reader.manifest.arrays and options.images is None:
        raise ConfigError(f"{cache_root} stores no images: give those that it was extracted from (--images)")
    names = chosen_taps(cache, options)
    objective = make_objective(options, cache.fit, cache.reader.manifest.recipe["codec"], names)
    views = Views(crop=options.crop, jitter=options.jitter, seed=options.seed)
    train_rows, held_rows = split_rows(cache, options.limit)
    loader = EpochLoader(
        cache,
        train_rows,
        names,
        batch_size=options.batch_size,
        seed=options.seed,
        threads=options.threads,
        shuffle=options.shuffle,
    )
    total, warmup = options.epochs * loader.num_batches, warmup_steps(options, loader.num_batches)
    compute = resolve_compute(options.device, options.precision)
    with FolderLock(out):
        fingerprint = cache.reader.manifest.fingerprint
        made_from = {"cache": fingerprint, "samples": cache.reader.manifest.files[SAMPLES]}
        claim_run(out, {**asdict(options), "precision": compute.precision, **made_from}, VOLATILE)
        student = build_student(
            options.student,
            {name: cache.shape(name) for name in names},
            cache.view,
            size=parse_size(options.student_size, "--student-size") if options.student_size else None,
            width=options.fpn_width,
            init=options.init,
            seed=options.seed,
            regressor=options.regressor,
        ).to(compute.device, memory_format=torch.channels_last)
        distillation = Distillation(
            student=student,
            decoder=cache.decoder(names).to(compute.device),
            objective=objective.to(compute.device),
            views=views,
            whitening=options.whitening,
            compute=compute,
        )
        for line in remarks(distillation, cache.reader.manifest.recipe, options):
            print(line, file=sys.stderr)
        optimizer = make_optimizer(student, options.optimizer, peak_lr(options), options.weight_decay)
        if not (out / "init" / "config.json").exists():
            save_backbone(student.backbone, out / "init", input_size=student.input_size, view=cache.view)
        clock = Clock()
        step = _restore(out, student, optimizer, clock)
        metrics = MetricsFile(out, step)
        with track(f"train {options.student}", total, step) as progress:
            while step < total:
                epoch, start = divmod(step, loader.num_batches)
                for batch in clock.waiting(loader.epoch(epoch, start)):
                    rate = peak_lr(options) * warmup_cosine(step, warmup, total)
                    losses = train_step(distillation, optimizer, batch, step, rate, options)
                    _require_finite(losses, step, batch, cache)
                    step += 1
                    clock.count(len(batch.rows))
                    progress.advance(
                        1, f"loss {losses['loss']:.4f}, {clock.rate:.0f} images/s, {clock.share:.0%} waiting"
                    )
                    if step % options.log_every == 0 or step == total:
                        metrics.write({"step": step, "epoch": epoch, "lr": rate, **losses, **clock.line()})
                    if step % options.save_every == 0 and step % loader.num_batches:
                        _save(out, student, optimizer, clock, metrics, step)
                held = held_out_losses(distillation, cache, held_rows, names, options.batch_size)
                metrics.write({"step": step, "epoch": epoch, **held})
                _save(out, student, optimizer, clock, metrics, step)
        save_backbone(student.backbone, out / "backbone", input_size=student.input_size, view=cache.view)
        return _finish(out, metrics, cache, names, step, options)


def chosen_taps(cache: Cache, options: TrainOptions) -> list[str]:
    """Return the arrays that --taps and --timestep ask for. Raises ConfigError naming what the cache has."""
    teacher = cache.reader.manifest.recipe["teacher"]
    timesteps, taps = teacher["timesteps"], [tap["name"] for tap in teacher["taps"]]
    wanted_t = [options.timestep] if options.timestep is not None else timesteps
    wanted_taps = list(parse_taps(options.taps)) if options.taps else taps
    for flag, wanted, have in (("--timestep", wanted_t, timesteps), ("--taps", wanted_taps, taps)):
        missing = [w for w in wanted if w not in have]
        if missing:
            raise ConfigError(f"{flag} {missing[0]}: the cache has {', '.join(map(str, have))}; choose among these")
    return [tap_name(t, tap) for t in timesteps if t in wanted_t for tap in taps if tap in wanted_taps]


def split_rows(cache: Cache, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and the rows held out, by hash of the key, without failed samples.

    Raises ConfigError where there are too few for both.
    """
    rows = cache.reader.usable_rows[:limit]
    if len(rows) < 4:
        raise ConfigError(f"expected at least 4 usable samples, some of them to be held out, got {len(rows)}")
    keys = cache.reader.samples["key"].take(rows).to_pylist()
    held = np.zeros(len(rows), bool)
    held[held_out(keys)] = True
    return rows[~held], rows[held]


def warmup_steps(options: TrainOptions, num_batches: int) -> int:
    """Return the steps of linear warm-up, by default a tenth of all. Raises ConfigError where none would be left."""
    epochs = options.epochs / 10 if options.warmup_epochs is None else options.warmup_epochs
    if epochs >= options.epochs:
        raise ConfigError(f"--warmup-epochs {epochs:g}: expected fewer than the {options.epochs} --epochs")
    return round(epochs * num_batches)


def peak_lr(options: TrainOptions) -> float:
    """Return the peak learning rate: the paper's 4e-3, scaled with the batch unless given."""
    if options.lr is not None:
        return options.lr
    return 4e-3 * options.batch_size / (256 if options.optimizer == "adamw" else 2048)


def _require_finite(losses: dict[str, float], step: int, batch: TrainBatch, cache: Cache) -> None:
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        keys = ", ".join(cache.reader.samples["key"].take(batch.rows[:3]).to_pylist())
        raise TrainingError(
            f"the loss is not finite at step {step} ({', '.join(bad)}; samples {keys}, ...); lower --lr, set "
            "--clip-grad or use --precision fp32, and delete the run to start anew"
        )


def _restore(out: Path, student: Student, optimizer: torch.optim.Optimizer, clock: Clock) -> int:
    """Load the last checkpoint, if there is one, and return the steps done."""
    state = load_checkpoint(out)
    if state is None:
        return 0
    student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    clock.load_state_dict(state["clock"])
    return int(state["step"])


def _save(
    out: Path, student: Student, optimizer: torch.optim.Optimizer, clock: Clock, metrics: MetricsFile, step: int
) -> None:
    metrics.flush()
    parts = {"student": student, "optimizer": optimizer, "clock": clock}
    save_checkpoint(out, {**{name: part.state_dict() for name, part in parts.items()}, "step": step})


def _finish(
    out: Path, metrics: MetricsFile, cache: Cache, names: Sequence[str], step: int, options: TrainOptions
) -> Trained:
    """Write summary.json and curves.png from the metrics."""
    lines = metrics.read()
    trained = [line for line in lines if "loss" in line]
    held = [line for line in lines if "held_out/loss" in line]
    floor = cache.reader.manifest.recipe["codec"]["noise_floor"]
    # The fit's floor is in the unit of the whitening a sample; it says nothing of the one a position.
    known = names if options.whitening == "sample" else []
    summary = {
        "steps": step,
        "loss": trained[-1]["loss"],
        "held_out": {
            key.removeprefix("held_out/"): value for key, value in held[-1].items() if key.startswith("held_out/")
        },
        "noise_floor": {name: floor[name] for name in known},
        "seconds": trained[-1]["seconds"],
        "images_per_second": trained[-1]["images_per_second"],
        "wait_share": trained[-1]["wait_share"],
    }
    write_file(out / "summary.json", json.dumps(summary, indent=1).encode())
    taps = {name: [line[f"held_out/mse/{name}"] for line in held] for name in names}
    with disk_errors(out):
        plot_curves(taps, out / "curves.png", title="Held-out whitened MSE", xlabel="epoch")
    return Trained(
        out=out,
        steps=step,
        held_out_loss=held[-1]["held_out/loss"],
        wait_share=trained[-1]["wait_share"],
    )
