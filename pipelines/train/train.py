"""Stage 2: train a student on a teacher's features, cached or computed in the loop."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dtcache.atomic_files import FolderLock, disk_errors, write_file
from dtcache.device import Compute, configure_process, memory_errors
from dtcache.distributed import Processes, join_processes
from dtcache.errors import CacheDamagedError
from dtcache.losses.objective import LABEL_TARGET
from dtcache.options import TrainOptions
from dtcache.options.toml import config_text
from dtcache.options.train import VOLATILE
from dtcache.student import Backbone, Student, probe_maps, save_backbone
from dtcache.student.logit_head import HeadSpec, logit_head, save_head
from pipelines.runs.folder import CONFIG, CURVES, SUMMARY, claim_run
from pipelines.runs.metrics import MetricsFile, NoMetrics, plot_curves, read_metrics
from pipelines.runs.trackers import open_tracker, require_tracker
from pipelines.terminal.progress import track
from pipelines.train.batch_source import BatchSource
from pipelines.train.cached_batches import CachedSource
from pipelines.train.distillation import remarks
from pipelines.train.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A finished run."""

    out: Path
    steps: int
    held_out_loss: float
    """Mean loss of the exported weights over the held-out samples."""
    wait_share: float
    """Share of the time spent waiting for data, 0 to 1."""


def train(where: Path, out: Path, options: TrainOptions) -> Trained:
    """Train a student on the cache `where`, or with `teacher` on images, and export its backbone.

    Resumes a run with the same options in `out`. Under torchrun every process calls this, and the
    first one writes `out`. Raises TrainingError, naming the samples, if the loss is not finite, and
    the errors of opening the cache or the teacher.
    """
    require_tracker(options.log_with)
    processes, compute = join_processes(options.device, options.precision)
    configure_process(compute.device)
    source = open_source(where, options, compute, processes)
    trainer = Trainer(source, options, compute, processes)
    with FolderLock(out) if processes.is_first else nullcontext():
        if processes.is_first:
            _begin(out, trainer, options, compute)
        processes.wait()
        trainer.restore(out)
        with (
            memory_errors(
                trainer.micro_batch_size, "pass a smaller `batch_size` or more `micro_batches`"
            ),
            _metrics(out, trainer, options, processes) as metrics,
            track(
                f"train {options.student}",
                trainer.total_steps,
                trainer.steps_done,
                shown=processes.is_first,
            ) as progress,
        ):
            clock = trainer.clock
            while trainer.steps_done < trainer.total_steps:
                epoch, start = divmod(trainer.steps_done, source.num_batches)
                micro_batches = source.epoch(epoch, start)
                for batch in clock.waiting(_grouped(micro_batches, options.micro_batches)):
                    line = trainer.step(batch)
                    step = trainer.steps_done
                    progress.advance(
                        1,
                        f"loss {line['loss']:.4f}, {clock.rate:.0f} images/s, "
                        f"{clock.share:.0%} waiting",
                    )
                    if step % options.log_every == 0 or step == trainer.total_steps:
                        metrics.write({"step": step, "epoch": epoch, **line, **clock.line()})
                    if step % options.save_every == 0 and step % source.num_batches:
                        metrics.flush()
                        trainer.save(out)
                if processes.is_first:
                    metrics.write({"step": step, "epoch": epoch, **trainer.evaluate()})
                metrics.flush()
                trainer.save(out)
        if processes.is_first:
            _finish(out, trainer, options)
        processes.wait()
        return _trained(out)


def open_source(
    where: Path, options: TrainOptions, compute: Compute, processes: Processes
) -> BatchSource:
    """Return the batches of a cache or, if the options name a teacher, of a teacher in the loop."""
    if options.teacher is None:
        return CachedSource(where, options, compute, processes)
    from pipelines.train.online_batches import OnlineSource

    return OnlineSource(where, options, compute, processes)


def _begin(out: Path, trainer: Trainer, options: TrainOptions, compute: Compute) -> None:
    """Claim the folder for these options and data; write options, remarks and initial weights."""
    source = trainer.source
    values = {**asdict(options), "precision": compute.precision}
    claim_run(out, {**values, **source.identity}, VOLATILE)
    write_file(out / CONFIG, config_text(values).encode())
    for line in remarks(trainer.student, trainer.objective, source.recipe, options):
        print(line, file=sys.stderr)
    if not (out / "init" / "config.json").exists():
        _save_backbone(trainer.student, out / "init", source)


def _metrics(
    out: Path, trainer: Trainer, options: TrainOptions, processes: Processes
) -> MetricsFile | NoMetrics:
    """Return the metrics file in the first process, and a sink in every other process."""
    if not processes.is_first:
        return NoMetrics()
    step = trainer.steps_done
    return MetricsFile(out, step, open_tracker(options.log_with, out, step, asdict(options)))


def _grouped(micro_batches: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Yield lists of `count` micro-batches; each list is one global batch."""
    left = iter(micro_batches)
    while group := list(islice(left, count)):
        yield group


def _save_backbone(student: Student, folder: Path, source: BatchSource) -> None:
    if not isinstance(student.backbone, Backbone):
        raise TypeError(f"expected a timm backbone, got {type(student.backbone).__name__}")
    save_backbone(student.backbone, folder, input_size=student.input_size, view=source.view)


def _finish(out: Path, trainer: Trainer, options: TrainOptions) -> None:
    """Export backbone and head; write summary.json and curves.png from the metrics."""
    source = trainer.source
    student = trainer.exported
    _save_backbone(student, out / "backbone", source)
    if source.labels is not None:
        spec = HeadSpec(
            classes=source.labels.classes,
            shapes=tuple(probe_maps(student.backbone, student.input_size)),
            grid=source.labels.shape[1:],
            width=options.fpn_width,
            regressor=options.regressor,
            input_size=student.input_size,
        )
        save_head(logit_head(student, LABEL_TARGET, spec), spec, out / "head")
    lines = read_metrics(out)
    last = [line for line in lines if "loss" in line][-1]
    prefix = "held_out/" if options.ema_decay is None else "held_out_ema/"
    held_out = [
        {name.removeprefix(prefix): v for name, v in line.items() if name.startswith(prefix)}
        for line in lines
    ]
    held_out = [line for line in held_out if line]
    summary = {
        "steps": trainer.steps_done,
        "loss": last["loss"],
        "held_out": held_out[-1],
        # The codec's fit measures the floor under whitening per sample; it does not hold for
        # whitening per position.
        "noise_floor": source.noise_floor if options.whitening == "sample" else {},
        "seconds": last["seconds"],
        "images_per_second": last["images_per_second"],
        "wait_share": last["wait_share"],
    }
    write_file(out / SUMMARY, json.dumps(summary, indent=1).encode())
    curves = {name: [line[f"mse/{name}"] for line in held_out] for name in source.names}
    title = "Held-out whitened MSE" if curves else "Held-out label loss"
    if source.labels is not None:
        curves["label loss"] = [line["label"] for line in held_out]
    with disk_errors(out):
        plot_curves(curves, out / CURVES, title=title, xlabel="epoch")


def _trained(out: Path) -> Trained:
    path = out / SUMMARY
    try:
        summary = json.loads(path.read_text())
        return Trained(
            out=out,
            steps=summary["steps"],
            held_out_loss=summary["held_out"]["loss"],
            wait_share=summary["wait_share"],
        )
    except (ValueError, KeyError) as error:
        raise CacheDamagedError(f"{path}: not the summary of a run; train again") from error
