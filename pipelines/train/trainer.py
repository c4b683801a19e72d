"""Students in training: gradients, update, held-out losses, saved and restored state."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtcache.compilation import compile_errors, compiled
from dtcache.device import Compute
from dtcache.distributed import Processes
from dtcache.errors import ConfigError, TrainingError, one_line
from dtcache.hashing import sha256_json
from dtcache.losses.objective import LABEL_TARGET
from dtcache.losses.teachers import make_teachers_objective
from dtcache.optim import Optimization, OptimizationSpec, require_same_tensors
from dtcache.options import TrainOptions, parse_size
from dtcache.recipe import Json, ViewSpec
from dtcache.student import Augmentation, Student, build_student, synchronise_batch_norm
from pipelines.runs.checkpoint import (
    checkpoint_errors,
    load_checkpoint,
    require_clock,
    require_number,
    save_checkpoint,
)
from pipelines.runs.clock import Clock
from pipelines.train.batch_source import BatchSource, decoded
from pipelines.train.distillation import DecodedBatch, Distillation, held_out_losses
from pipelines.train.finished_run import FinishedRun

KEYS_NAMED = 8
"""Most samples that an error names."""


class Trainer:
    """A student in training, in one of the run's processes."""

    def __init__(
        self,
        source: BatchSource,
        options: TrainOptions,
        compute: Compute,
        processes: Processes,
    ) -> None:
        """Build the student on the device, at step 0. Raises ConfigError for bad options."""
        self.source = source
        self.micro_batch_size = options.batch_size // (processes.world_size * options.micro_batches)
        if self.micro_batch_size < 2:
            # Batch normalisation has nothing to average over in a batch of one.
            raise ConfigError(
                f"`micro_batches` {options.micro_batches}: expected at least 2 samples per "
                f"micro-batch, got {self.micro_batch_size}; pass fewer `micro_batches`"
            )
        codecs = [teacher.codec["name"] for teacher in source.teachers if teacher.codec]
        if options.whitening == "position" and set(codecs) - {"float16"}:
            raise ConfigError(
                "`whitening='position'`: expected a cache of exact features; extract it with "
                "quality fp16"
            )
        augmentation = Augmentation(
            scale=options.scale, color_jitter=options.color_jitter, seed=options.seed
        )
        shapes = {name: source.shape(name) for name in source.names}
        self.objective = make_teachers_objective(options, source.teachers, shapes)
        self.objective.to(compute.device)
        self.student = new_student(target_shapes(source), source.view, options)
        self.student.to(compute.device).to(memory_format=torch.channels_last)
        if processes.world_size > 1 and compute.device.type == "cuda":
            synchronise_batch_norm(self.student)
        self.total_steps = options.epochs * source.num_batches
        self.steps_done = 0
        self.epochs_before = 0
        """Epochs of the run that this one extends, and of those that it extends."""
        self.steps_before = 0
        """Their steps. Order, views, crops and random layers continue after them."""
        self.clock = Clock()
        self._sums: dict[str, Tensor] = {}
        self._options = options
        self._compute = compute
        self._processes = processes
        self._distillation = Distillation(
            objective=self.objective,
            augmentation=augmentation,
            input_size=self.student.input_size,
            whitening=options.whitening,
            compute=compute,
        )
        self._optimization = Optimization(
            self.student,
            OptimizationSpec(
                kind=options.optimizer,
                lr=options.peak_lr,
                weight_decay=options.weight_decay,
                warmup_steps=round(options.warmup * source.num_batches),
                total_steps=self.total_steps,
                clip_grad=options.clip_grad,
                ema_decay=options.ema_decay,
                scale_loss=compute.precision == "fp16",
            ),
        )
        # The last layers of a backbone, which feed no pyramid level, may take no part in the loss.
        self._parallel = (
            DistributedDataParallel(self.student, find_unused_parameters=True)
            if processes.world_size > 1
            else None
        )
        network: nn.Module = self._parallel or self.student
        self._network: Callable[[Tensor], Mapping[str, Tensor]] = (
            compiled(network) if options.compile else network
        )
        # Held-out batches have another size, and torch.compile compiles each size: they use the
        # plain objective.
        self._step_objective = compiled(self.objective) if options.compile else self.objective

    def accumulate(self, batch: DecodedBatch, number: int, count: int) -> None:
        """Add the gradients of micro-batch `number`, from 0, of the `count` of a global batch.

        Random layers (dropout, dropped paths) draw from (seed, step, micro-batch), augmentation
        and teacher dropping from (seed, step, row). The step counts those of the runs that are
        extended.
        """
        self.student.train()
        torch.manual_seed(self._draw_seed(number, count))
        step = self.steps_before + self.steps_done
        images_BCHW, targets = self._distillation.inputs(batch, step)
        uniforms_BT = self._distillation.dropping_uniforms(batch, step)
        with self._synchronised(last=number + 1 == count):
            with self._compute.autocast():
                predicted = self._network(images_BCHW)
            losses = self._step_objective(predicted, targets, uniforms_BT)
            with compile_errors():
                self._optimization.backward(losses["loss"] / count)
        before = self._sums if number else {}
        self._sums = {name: before.get(name, 0) + x.detach() for name, x in losses.items()}

    def update(self, batches: Sequence[Any]) -> dict[str, float]:
        """Take the optimizer step of a global batch whose micro-batches have been accumulated.

        Returns `lr`, then the losses before the step, as means over all processes. Raises
        TrainingError, and takes no step, if a loss is not finite; the error names samples of
        `batches`, the micro-batches.
        """
        sums = torch.stack(list(self._sums.values()))
        # One read of the device per step.
        means = self._processes.mean(sums / len(batches)).tolist()
        line = dict(zip(self._sums, means, strict=True))
        self._require_finite(line, batches)
        lr = self._optimization.update(self.steps_done)
        self.steps_done += 1
        self.clock.count(self._options.batch_size)
        return {"lr": lr, **line}

    @property
    def evaluated(self) -> dict[str, tuple[Distillation, Student]]:
        """The students that held-out losses are computed of, by the prefix of the losses' names."""
        students = {"held_out": self.student}
        if self._optimization.averaged is not None:
            students["held_out_ema"] = self.exported
        return {prefix: (self._distillation, student) for prefix, student in students.items()}

    def save(self, out: Path) -> None:
        """Write the checkpoint, in the first process. Raises DiskError."""
        if self._processes.is_first:
            save_checkpoint(
                out,
                {
                    "student": self.student.state_dict(),
                    **self._optimization.state_dict(),
                    "clock": self.clock.state_dict(),
                    "step": self.steps_done,
                    "source": recorded_source(self.source),
                },
            )

    def extend(self, run: FinishedRun) -> None:
        """Start from the weights, the optimizer's moments and the EMA of a finished run.

        Raises ConfigError if the run has other targets or another network, and CacheDamagedError if
        its checkpoint cannot be read.
        """
        state = run.checkpoint()
        source = state.get("source")
        recorded = source if isinstance(source, dict) else {}
        run.require_same_source(recorded, recorded_source(self.source))
        try:
            self._load(state)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"`extend` {run.root}: its weights and optimizer do not fit this student "
                f"({one_line(error, 200)}); pass the options of that run, which its config.toml has"
            ) from error
        self.epochs_before = run.epochs
        self.steps_before = run.steps

    def restore(self, out: Path) -> None:
        """Continue from the run's checkpoint, if there is one. Raises CacheDamagedError."""
        state = load_checkpoint(out)
        if state is not None:
            with checkpoint_errors(out):
                require_clock(state["clock"])
                require_number("step", state["step"], kind=int, most=self.total_steps)
                self._load(state)
                self.clock.load_state_dict(state["clock"])
                self.steps_done = state["step"]

    def _load(self, state: dict[str, Any]) -> None:
        """Load weights and optimizer. Raises ValueError, KeyError or TypeError if they do not fit.

        A state without moments is one of step 0.
        """
        require_same_tensors("student", self.student.state_dict(), state["student"])
        if state["step"] and not state["optimizer"]["state"]:
            raise ValueError("optimizer: its moments are missing")
        self._optimization.load_state_dict(state)
        self.student.load_state_dict(state["student"])

    @property
    def exported(self) -> Student:
        """The student that the run exports: its EMA if there is one."""
        averaged = self._optimization.averaged
        # torch types the copy as any module.
        return self.student if averaged is None else cast(Student, averaged)

    def _draw_seed(self, number: int, count: int) -> int:
        """Return the seed of the random layers in one micro-batch, counted over all processes."""
        micro_batch = self._processes.rank * count + number
        step = self.steps_before + self.steps_done
        described = ["student", self._options.seed, step, micro_batch]
        return int(sha256_json(described)[:15], 16)

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch: the last one of a step exchanges the gradients."""
        return nullcontext() if last or self._parallel is None else self._parallel.no_sync()

    def _require_finite(self, losses: Mapping[str, float], batches: Sequence[Any]) -> None:
        """Raise TrainingError, naming losses and samples, if a loss is not finite."""
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if not bad:
            return
        again = [decoded(self.source, batch) for batch in batches]
        rows = [row for batch in again for row in batch.not_finite()]
        # If every target is finite, any sample may be the reason.
        rows = rows or [row for batch in again for row in batch.rows.tolist()]
        keys = self._processes.gathered(self.source.keys(rows))
        more = f", ... ({len(keys)} in all)" if len(keys) > KEYS_NAMED else ""
        raise TrainingError(
            f"the loss is not finite at step {self.steps_done} ({', '.join(bad)}; samples "
            f"{', '.join(keys[:KEYS_NAMED])}{more}); lower `lr`, pass `clip_grad` or use "
            "`precision='fp32'`, and delete the run to start again"
        )


def accumulate(source: BatchSource, trainers: Sequence[Trainer], batches: Sequence[Any]) -> None:
    """Add every trainer's gradients of a global batch. Each micro-batch is decoded once."""
    for number, batch in enumerate(batches):
        shared = decoded(source, batch)
        for trainer in trainers:
            trainer.accumulate(shared, number, len(batches))


def evaluate(source: BatchSource, trainers: Sequence[Trainer]) -> list[dict[str, float]]:
    """Return each trainer's mean held-out losses: `held_out/...`, and `held_out_ema/...` of an EMA.

    Each batch is decoded once.
    """
    students = [
        (number, *item) for number, t in enumerate(trainers) for item in t.evaluated.items()
    ]
    losses = held_out_losses(
        (decoded(source, batch) for batch in source.held_out()),
        [student for _, _, student in students],
    )
    lines: list[dict[str, float]] = [{} for _ in trainers]
    for (number, prefix, _), of_student in zip(students, losses, strict=True):
        lines[number] |= {f"{prefix}/{name}": value for name, value in of_student.items()}
    return lines


def target_shapes(source: BatchSource) -> dict[str, tuple[int, int, int]]:
    """Return (C, H, W) of a source's targets by array, and by LABEL_TARGET if it has labels."""
    labels = {LABEL_TARGET: source.labels.shape} if source.labels is not None else {}
    return {name: source.shape(name) for name in source.names} | labels


def recorded_source(source: BatchSource) -> Json:
    """Return what a student's heads depend on: targets, teacher's weights, classes of labels."""
    return {
        "targets": {name: list(shape) for name, shape in target_shapes(source).items()},
        "teacher": _weights_of(source),
        "classes": list(source.labels.classes) if source.labels is not None else None,
    }


def _weights_of(source: BatchSource) -> str | dict[str, str | None] | None:
    """Return the hash of the teacher's weights; of several teachers, the hashes by name."""
    hashes = {teacher.name: teacher.weights_sha256 for teacher in source.teachers}
    return hashes[""] if list(hashes) == [""] else hashes


def new_student(
    shapes: Mapping[str, tuple[int, int, int]], view: ViewSpec, options: TrainOptions
) -> Student:
    """Return the student of a run before training, on the CPU. Raises ConfigError.

    `shapes` are (C, H, W) by array, and by LABEL_TARGET if the run has soft labels.
    """
    return build_student(
        options.student,
        shapes,
        view,
        size=parse_size(options.student_size, "student_size") if options.student_size else None,
        width=options.fpn_width,
        init=options.init,
        seed=options.seed,
        regressor=options.regressor,
    )


def exported_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the weights that a run exports from its checkpoint: their EMA if it has one."""
    average = checkpoint.get("average")
    if average is None:
        weights: dict[str, Any] = checkpoint["student"]
        return weights
    prefix = "module."
    return {
        name.removeprefix(prefix): value
        for name, value in average.items()
        if name.startswith(prefix)
    }
