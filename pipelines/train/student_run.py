"""One student's run: its folder, from the claim over metrics and checkpoints to the export."""

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dtcache.atomic_files import FolderLock, disk_errors, write_file
from dtcache.device import Compute
from dtcache.distributed import Processes
from dtcache.errors import CacheDamagedError, CacheMismatchError, ConfigError, TrainingError
from dtcache.losses.objective import LABEL_TARGET
from dtcache.options import TrainOptions
from dtcache.options.toml import config_text
from dtcache.options.train import VOLATILE
from dtcache.recipe import Json, ViewSpec
from dtcache.student import Backbone, Student, probe_maps, save_backbone
from dtcache.student.logit_head import HeadSpec, logit_head, save_head
from pipelines.runs.curves import plot_curves
from pipelines.runs.folder import (
    BACKBONE,
    CONFIG,
    CURVES,
    METRICS,
    SUMMARY,
    claim_run,
    finished_epochs,
    read_summary,
    require_same_run,
)
from pipelines.runs.metrics import MetricsFile, NoMetrics, read_metrics
from pipelines.runs.trackers import open_tracker
from pipelines.train.batch_source import BatchSource
from pipelines.train.finished_run import FinishedRun
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


class StudentRun(AbstractContextManager["StudentRun"]):
    """A run in one of its processes; the first process writes the folder.

    Use it as a context manager around the steps: its metrics and tracker are open inside.
    """

    def __init__(
        self,
        out: Path,
        options: TrainOptions,
        source: BatchSource,
        compute: Compute,
        processes: Processes,
    ) -> None:
        """Build the student, and write nothing. Raises ConfigError for bad options."""
        extended = extended_run(out, options)
        self.out = out
        self.options = options
        self.trainer = Trainer(source, options, compute, processes)
        if extended is not None:
            self.trainer.extend(extended)
        self.failure: TrainingError | None = None
        """Why the run ended early, if it did."""
        self._source = source
        self._processes = processes
        values = {**asdict(options), "precision": compute.precision}
        self._config = config_text(values).encode()
        self._identity: Json = {**values, **source.identity}
        if extended is not None:
            self._identity |= extended.identity
        self._metrics: MetricsFile | NoMetrics = NoMetrics()
        self._lock: FolderLock | None = None

    @property
    def is_active(self) -> bool:
        """Whether the run has steps left to take."""
        return self.failure is None and self.trainer.steps_done < self.trainer.total_steps

    def check_folder(self) -> None:
        """Raise CacheMismatchError if the folder holds another run or other files."""
        epochs = finished_epochs(self.out)
        if epochs is not None and epochs < self.options.epochs:
            require_same_run(self.out, self._identity, (*VOLATILE, "epochs"))
            raise CacheMismatchError(
                f"{self.out} holds a finished run of {epochs} `epochs`, got {self.options.epochs}; "
                f"to train it further, pass `extend` {self.out}, the further `epochs` and another "
                "`out`"
            )
        require_same_run(self.out, self._identity, VOLATILE)

    def begin(self, lock: FolderLock) -> None:
        """Claim the locked folder for these options and data; write options, initial weights.

        The first step keeps them.
        """
        self._lock = lock
        claim_run(self.out, self._identity, VOLATILE)
        write_file(self.out / CONFIG, self._config)
        if not (self.out / "init" / "config.json").exists():
            save_student(self.trainer.student, self.out / "init", self._source.view)

    def __enter__(self) -> Self:
        """Open metrics and tracker, after the checkpoint's step. Raises DiskError, ConfigError."""
        if self._processes.is_first:
            step = self.trainer.steps_done
            tracker = open_tracker(self.options.log_with, self.out, step, asdict(self.options))
            self._metrics = MetricsFile(self.out, step, tracker)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failure = error or self.failure
        self._metrics.__exit__(type(failure) if failure else None, failure, trace)

    def is_due(self, step: int) -> bool:
        """Return whether the run takes the step of this number, from 0, next."""
        return self.is_active and self.trainer.steps_done == step

    def update(self, batches: Sequence[Any]) -> float:
        """Take the optimizer step of a global batch; log and save if that is due.

        Returns the loss. If it is not finite, the step is not taken, and `failure` is set.
        """
        epoch = self.trainer.steps_done // self._source.num_batches
        try:
            line = self.trainer.update(batches)
        except TrainingError as error:
            self.failure = error
            return math.nan
        if self._lock is not None:
            self._lock.keep()
        step = self.trainer.steps_done
        if step % self.options.log_every == 0 or step == self.trainer.total_steps:
            self._metrics.write({"step": step, "epoch": epoch, **line, **self.trainer.clock.line()})
        if step % self.options.save_every == 0 and step % self._source.num_batches:
            self._save()
        return line["loss"]

    def end_epoch(self, held_out: dict[str, float]) -> None:
        """Log held-out losses, which the first process has, and save a checkpoint."""
        if held_out:
            step = self.trainer.steps_done
            epoch = step // self._source.num_batches - 1
            self._metrics.write({"step": step, "epoch": epoch, **held_out})
        self._save()

    def finish(self) -> Trained:
        """Export backbone and head; write summary.json and curves.png from the metrics."""
        if self._processes.is_first:
            self._export()
            self._summarise()
        self._processes.wait()
        return _trained(self.out)

    def _save(self) -> None:
        self._metrics.flush()
        self.trainer.save(self.out)

    def _export(self) -> None:
        source = self._source
        student = self.trainer.exported
        save_student(student, self.out / BACKBONE, source.view)
        if source.labels is not None:
            spec = HeadSpec(
                classes=source.labels.classes,
                shapes=tuple(probe_maps(student.backbone, student.input_size)),
                grid=source.labels.shape[1:],
                width=self.options.fpn_width,
                regressor=self.options.regressor,
                input_size=student.input_size,
            )
            save_head(logit_head(student, LABEL_TARGET, spec), spec, self.out / "head")

    def _summarise(self) -> None:
        try:
            self._write_summary(read_metrics(self.out))
        except KeyError as error:
            raise CacheDamagedError(
                f"{self.out / METRICS}: not the metrics of this run ({error!r} is missing); delete "
                "the run and train again"
            ) from error

    def _write_summary(self, lines: Sequence[Json]) -> None:
        steps = self.trainer.total_steps
        at_end = [line for line in lines if line["step"] == steps]
        last = [line for line in at_end if "loss" in line]
        # Lines with a number that is not finite are not read, and none after them.
        if not (last and any(exported_losses(line, self.options) for line in at_end)):
            raise TrainingError(
                f"{self.out / METRICS}: no finite losses of the last step, {steps}; if the student "
                "diverged, pass a lower `lr` and a new `out`; if the file is damaged, delete the "
                "run and train again"
            )
        held_out = [losses for line in lines if (losses := exported_losses(line, self.options))]
        write_summary(self.out, self.options, self._source, last[-1], held_out[-1])
        names = self._source.names
        curves = {name: [line[f"mse/{name}"] for line in held_out] for name in names}
        title = "Held-out whitened MSE" if curves else "Held-out label loss"
        if self._source.labels is not None:
            curves["label loss"] = [line["label"] for line in held_out]
        with disk_errors(self.out):
            plot_curves(curves, self.out / CURVES, title=title, xlabel="epoch")


def extended_run(out: Path, options: TrainOptions) -> FinishedRun | None:
    """Return the finished run that the run in `out` extends; None without `extend`.

    Raises ConfigError if that folder holds no finished run, if it is `out`, or if its options do
    not agree with `options`.
    """
    if options.extend is None:
        return None
    if options.extend.resolve() == out.resolve():
        raise ConfigError(
            f"`extend` {options.extend}: expected another folder than `out`, as the finished run "
            "stays as it is; pass a new `out`"
        )
    run = FinishedRun.read(options.extend)
    run.require_same_student(options)
    return run


def save_student(student: Student, folder: Path, view: ViewSpec) -> None:
    """Write a student's backbone to a folder. Raises TypeError if it is no timm network."""
    if not isinstance(student.backbone, Backbone):
        raise TypeError(f"expected a timm backbone, got {type(student.backbone).__name__}")
    save_backbone(student.backbone, folder, input_size=student.input_size, view=view)


def exported_losses(line: Json, options: TrainOptions) -> dict[str, float]:
    """Return the held-out losses of the exported weights in a line of metrics, by loss.

    The exported weights are the EMA if there is one. Empty if the line has no held-out losses.
    """
    prefix = "held_out/" if options.ema_decay is None else "held_out_ema/"
    return {
        name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)
    }


def write_summary(
    out: Path, options: TrainOptions, source: BatchSource, last: Json, held_out: dict[str, float]
) -> None:
    """Write summary.json from the metrics of the last step and from the last held-out losses."""
    floors = {name: floor for t in source.teachers for name, floor in t.noise_floor.items()}
    summary = {
        "steps": last["step"],
        "loss": last["loss"],
        "held_out": held_out,
        # The codec's fit measures the floor under whitening per sample; it does not hold for
        # whitening per position.
        "noise_floor": floors if options.whitening == "sample" else {},
        "seconds": last["seconds"],
        "images_per_second": last["images_per_second"],
        "wait_share": last["wait_share"],
    }
    write_file(out / SUMMARY, json.dumps(summary, indent=1).encode())


def _trained(out: Path) -> Trained:
    summary = read_summary(out)
    return Trained(
        out=out,
        steps=summary["steps"],
        held_out_loss=summary["held_out"]["loss"],
        wait_share=summary["wait_share"],
    )
