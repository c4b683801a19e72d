"""Stage 2: a student regresses the features of a teacher: cached ones, or a teacher's in the loop."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dtcache.atomic_files import FolderLock, disk_errors, write_file
from dtcache.cache.label_set import LabelSet
from dtcache.device import Compute, compiled, configure_process, memory_errors
from dtcache.distributed import Processes, join_processes
from dtcache.errors import ConfigError, TrainingError
from dtcache.losses.objective import LABEL_TARGET, make_objective
from dtcache.options import TrainOptions, parse_size
from dtcache.options.toml import config_text
from dtcache.schedule import warmup_cosine
from dtcache.student import (
    Augmentation,
    Backbone,
    Student,
    build_student,
    probe_maps,
    save_backbone,
)
from dtcache.student.logit_head import HeadSpec, logit_head, save_head
from pipelines.runs.folder import (
    CONFIG,
    SUMMARY,
    Clock,
    MetricsFile,
    NoMetrics,
    claim_run,
    load_checkpoint,
    save_checkpoint,
)
from pipelines.runs.plots import plot_curves
from pipelines.terminal.progress import track
from pipelines.train.cached_batches import BatchSource, CachedSource
from pipelines.train.distillation import (
    Distillation,
    held_out_losses,
    not_finite,
    remarks,
    train_step,
)
from pipelines.train.option_conflicts import require_consistent
from pipelines.train.train_state import Learner

VOLATILE = (
    "images",
    "teacher",
    "device",
    "threads",
    "save_every",
    "log_every",
    "accumulate",
    "compile",
    "allow_incomplete",
)
"""What may differ when a run is resumed: of these, only rounding hangs on some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a finished run left behind."""

    out: Path
    steps: int
    held_out_loss: float
    """Of the exported weights."""
    wait_share: float


def train(where: Path, out: Path, options: TrainOptions) -> Trained:
    """Train a student on a cache, or `--online` on images, and export its backbone; resumes a run of the same options.

    Under torchrun every process calls this; the first one writes `out`. Raises TrainingError where the loss is not
    finite, naming the samples, and what its parts raise.
    """
    require_consistent(options)
    warmup_steps(options, 1)
    processes, compute = join_processes(options.device, options.precision)
    configure_process(compute.device)
    part = options.batch_size // (processes.world_size * options.accumulate)
    if part < 2:
        # Batch normalisation has nothing to average over in a batch of one.
        raise ConfigError(
            f"--accumulate {options.accumulate}: expected at least 2 samples a part, got {part}"
        )
    augmentation = Augmentation(scale=options.crop, color_jitter=options.jitter, seed=options.seed)
    source = make_source(where, options, compute, processes)
    objective = make_objective(options, source.fit, source.recipe.get("codec") or {}, source.names)
    total = options.epochs * source.num_batches
    warmup = warmup_steps(options, source.num_batches)
    with FolderLock(out) if processes.is_first else nullcontext():
        if processes.is_first:
            _claim(out, source, options, compute)
        processes.wait()
        student = _student(source, options)
        held_out = Distillation(
            decoder=source.decoder,
            label_decoder=source.labels.decoder().to(compute.device)
            if source.labels is not None
            else None,
            objective=objective.to(compute.device),
            augmentation=augmentation,
            input_size=student.input_size,
            whitening=options.whitening,
            compute=compute,
        )
        # Held-out batches are of another size, and each size is compiled anew.
        distillation = (
            replace(held_out, objective=compiled(objective)) if options.compile else held_out
        )
        for line in (
            remarks(student, objective, source.recipe, options) if processes.is_first else ()
        ):
            print(line, file=sys.stderr)
        if processes.is_first and not (out / "init" / "config.json").exists():
            _save_backbone(student, out / "init", source)
        learner = Learner(student, options, peak_lr(options), compute, processes)
        clock = Clock()
        step = _restore(out, learner, clock)
        metrics = MetricsFile(out, step) if processes.is_first else NoMetrics()
        shown = track(f"train {options.student}", total, step, shown=processes.is_first)
        with (
            memory_errors(part, "give a smaller --batch-size, or --accumulate to take it in parts"),
            shown as progress,
        ):
            while step < total:
                epoch, start = divmod(step, source.num_batches)
                for batches in clock.waiting(
                    _grouped(source.epoch(epoch, start), options.accumulate)
                ):
                    rate = peak_lr(options) * warmup_cosine(step, warmup, total)
                    losses = train_step(
                        learner, distillation, source, batches, step, rate, options, processes
                    )
                    _require_finite(losses, step, batches, source, processes)
                    step += 1
                    clock.count(options.batch_size)
                    progress.advance(
                        1,
                        f"loss {losses['loss']:.4f}, {clock.rate:.0f} images/s, {clock.share:.0%} waiting",
                    )
                    if step % options.log_every == 0 or step == total:
                        metrics.write(
                            {"step": step, "epoch": epoch, "lr": rate, **losses, **clock.line()}
                        )
                    if step % options.save_every == 0 and step % source.num_batches:
                        _save(out, learner, clock, metrics, step, processes)
                if processes.is_first:
                    metrics.write(
                        {"step": step, "epoch": epoch, **_held_out(learner, held_out, source)}
                    )
                _save(out, learner, clock, metrics, step, processes)
        trained = learner.exported
        if isinstance(metrics, MetricsFile):
            _save_backbone(trained, out / "backbone", source)
            if source.labels is not None:
                _save_head(trained, source.labels, out, options)
            _finish(out, metrics, source, step, options)
        processes.wait()
        return _trained(out)


def make_source(
    where: Path, options: TrainOptions, compute: Compute, processes: Processes
) -> BatchSource:
    """Return the batches that the options ask for."""
    if not options.online:
        return CachedSource(where, options, compute, processes)
    from pipelines.train.online_batches import OnlineSource

    return OnlineSource(where, options, compute, processes)


def _claim(out: Path, source: BatchSource, options: TrainOptions, compute: Compute) -> None:
    """Take the folder for these options and data, and write the options where --config reads them."""
    values = {**asdict(options), "precision": compute.precision}
    claim_run(out, {**values, **source.identity}, VOLATILE)
    write_file(out / CONFIG, config_text(values).encode())


def _student(source: BatchSource, options: TrainOptions) -> Student:
    labels = {LABEL_TARGET: source.labels.shape} if source.labels is not None else {}
    return build_student(
        options.student,
        {name: source.shape(name) for name in source.names} | labels,
        source.view,
        size=parse_size(options.student_size, "student_size") if options.student_size else None,
        width=options.fpn_width,
        init=options.init,
        seed=options.seed,
        regressor=options.regressor,
    )


def _save_backbone(student: Student, folder: Path, source: BatchSource) -> None:
    assert isinstance(student.backbone, Backbone), "options name it by its timm name"
    save_backbone(student.backbone, folder, input_size=student.input_size, view=source.view)


def _save_head(student: Student, labels: LabelSet, out: Path, options: TrainOptions) -> None:
    """Write what of the student gives its logits, beside its backbone."""
    spec = HeadSpec(
        classes=labels.classes,
        shapes=tuple(probe_maps(student.backbone, student.input_size)),
        grid=labels.shape[1:],
        width=options.fpn_width,
        regressor=options.regressor,
        input_size=student.input_size,
    )
    save_head(logit_head(student, LABEL_TARGET, spec), spec, out / "head")


def _grouped(batches: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Yield so many batches at a time: the parts of one step."""
    left = iter(batches)
    while group := list(islice(left, count)):
        yield group


def warmup_steps(options: TrainOptions, num_batches: int) -> int:
    """Return the steps of linear warm-up, by default a tenth of all. Raises ConfigError where none would be left."""
    epochs = options.epochs / 10 if options.warmup_epochs is None else options.warmup_epochs
    if epochs >= options.epochs:
        raise ConfigError(
            f"--warmup-epochs {epochs:g}: expected fewer than the {options.epochs} --epochs"
        )
    return round(epochs * num_batches)


def peak_lr(options: TrainOptions) -> float:
    """Return the peak learning rate: the paper's 4e-3, scaled with the batch unless given."""
    if options.lr is not None:
        return options.lr
    return 4e-3 * options.batch_size / (256 if options.optimizer == "adamw" else 2048)


def _require_finite(
    losses: dict[str, float],
    step: int,
    batches: Sequence[Any],
    source: BatchSource,
    processes: Processes,
) -> None:
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        keys = processes.gathered(source.keys(not_finite(source, batches)))
        named = ", ".join(keys[:8]) + (f", ... ({len(keys)} in all)" if len(keys) > 8 else "")
        raise TrainingError(
            f"the loss is not finite at step {step} ({', '.join(bad)}; samples {named}); lower --lr, set --clip-grad "
            "or use --precision fp32, and delete the run to start anew"
        )


def _held_out(
    learner: Learner, distillation: Distillation, source: BatchSource
) -> dict[str, float]:
    """Return held-out losses of the student as `held_out/...`, and of its average as `held_out_ema/...`."""
    students = {"held_out": learner.student}
    if learner.average is not None:
        students["held_out_ema"] = learner.exported
    return {
        f"{title}/{name}": value
        for title, student in students.items()
        for name, value in held_out_losses(
            distillation, student, map(source.ready, source.held_out())
        ).items()
    }


def _restore(out: Path, learner: Learner, clock: Clock) -> int:
    """Load the last checkpoint, if there is one, and return its step."""
    state = load_checkpoint(out)
    if state is None:
        return 0
    learner.load_state_dict(state)
    clock.load_state_dict(state["clock"])
    return int(state["step"])


def _save(
    out: Path,
    learner: Learner,
    clock: Clock,
    metrics: MetricsFile | NoMetrics,
    step: int,
    processes: Processes,
) -> None:
    if processes.is_first:
        metrics.flush()
        save_checkpoint(out, {**learner.state_dict(), "clock": clock.state_dict(), "step": step})


def _finish(
    out: Path, metrics: MetricsFile, source: BatchSource, step: int, options: TrainOptions
) -> None:
    """Write summary.json and curves.png from the metrics."""
    lines = metrics.read()
    trained = [line for line in lines if "loss" in line]
    title = "held_out/" if options.ema is None else "held_out_ema/"
    held = [
        {k.removeprefix(title): v for k, v in line.items() if k.startswith(title)} for line in lines
    ]
    held = [line for line in held if line]
    summary = {
        "steps": step,
        "loss": trained[-1]["loss"],
        "held_out": held[-1],
        # A fit's floor is in the unit of the whitening a sample; it says nothing of the one a position.
        "noise_floor": source.noise_floor if options.whitening == "sample" else {},
        "seconds": trained[-1]["seconds"],
        "images_per_second": trained[-1]["images_per_second"],
        "wait_share": trained[-1]["wait_share"],
    }
    write_file(out / SUMMARY, json.dumps(summary, indent=1).encode())
    curves = {name: [line[f"mse/{name}"] for line in held] for name in source.names}
    title = "Held-out whitened MSE" if curves else "Held-out label loss"
    if source.labels is not None:
        curves["label loss"] = [line["label"] for line in held]
    with disk_errors(out):
        plot_curves(curves, out / "curves.png", title=title, xlabel="epoch")


def _trained(out: Path) -> Trained:
    summary = json.loads((out / SUMMARY).read_text())
    loss = summary["held_out"]["loss"]
    share = summary["wait_share"]
    return Trained(out=out, steps=summary["steps"], held_out_loss=loss, wait_share=share)
