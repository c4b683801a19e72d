"""What a run says when it starts: its cost, and what its options imply for these data."""

import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dtcache.device_memory import peak_bytes
from dtcache.losses.teachers import TeachersObjective, TeacherTargets
from dtcache.options import TrainOptions
from dtcache.recipe import ViewSpec
from dtcache.student import Student
from dtcache.student.student import default_size
from pipelines.terminal.output import say
from pipelines.terminal.text import byte_size, duration
from pipelines.train.trainer import Trainer, target_shapes

NOTABLE_SHARE = 1 / 3
"""Share of a step's operations from which on the regressor is mentioned."""
WARM_UP_STEPS = 2
"""Steps that are not timed: they allocate memory and compile kernels."""
TIMED_STEPS = 10
LEAST_SECONDS = 60.0
"""Shortest rest of a run whose time is estimated."""


def remarks(trainer: Trainer, options: TrainOptions) -> list[str]:
    """Return notes for the user about a run that is about to start or to resume, as lines."""
    source = trainer.source
    student = trainer.student
    lines = [
        extension_line(trainer, options),
        cost_line(trainer, options),
        regressor_line(student, options),
        size_line(student.input_size, target_shapes(source), source.view),
        *(
            f"{name}: no pyramid level has its grid; its prediction is resized bilinearly"
            for name in student.regressor.resized
        ),
        noise_line(trainer.objective, options),
        crops_line(source.teachers, options),
        *teacher_lines(source.teachers, options),
    ]
    return [line for line in lines if line is not None]


def extension_line(trainer: Trainer, options: TrainOptions) -> str | None:
    """Return what the run extends, if it extends a run."""
    if options.extend is None:
        return None
    return (
        f"extends {options.extend}, which was trained for {trainer.epochs_before} epochs "
        f"({trainer.steps_before:,} steps), by {options.epochs} with a new warm-up and cosine"
    )


def cost_line(trainer: Trainer, options: TrainOptions) -> str:
    """Return the steps of a run, and the bytes of its state in memory and in its checkpoint."""
    parameters, buffers = (
        sum(x.numel() * x.element_size() for x in tensors)
        for tensors in (trainer.student.parameters(), trainer.student.buffers())
    )
    weights = parameters + buffers
    # Both optimizers keep two moving averages per parameter.
    checkpoint = weights + 2 * parameters + (0 if options.ema_decay is None else weights)
    done = f" ({trainer.steps_done:,} done)" if trainer.steps_done else ""
    return (
        f"{trainer.total_steps:,} steps of {options.batch_size} images{done}; weights, gradients "
        f"and optimizer take {byte_size(checkpoint + parameters)} of memory, the checkpoint "
        f"{byte_size(checkpoint)}"
    )


def regressor_line(student: Student, options: TrainOptions) -> str | None:
    """Return the regressor's share of a step's operations if it is above a third."""
    share = regressor_share(student)
    if share <= NOTABLE_SHARE:
        return None
    return (
        f"the regressor ({options.regressor}, width {options.fpn_width}) takes {share:.0%} of a "
        "step's operations; a smaller `fpn_width` makes steps faster"
    )


@torch.no_grad()
def regressor_share(student: Student) -> float:
    """Return the regressor's share of the student's floating-point operations, 0 to 1.

    The operations are those of one image's forward pass. A backward pass has about twice as many in
    each part, so that the share of a training step is about the same. Leaves the student in
    evaluation mode.
    """
    student.eval()
    like = next(student.parameters())
    image = torch.zeros(1, 3, *student.input_size, device=like.device)
    # The counter knows the operations of plain attention on every device, not of fused kernels.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        student(image)
    per_module = counter.get_flop_counts()
    name = type(student).__name__
    total, backbone = (int(sum(per_module[key].values())) for key in (name, f"{name}.backbone"))
    return (total - backbone) / total


def size_line(
    size: tuple[int, int], targets: Mapping[str, tuple[int, int, int]], view: ViewSpec
) -> str | None:
    """Return a note if the student's input is larger than the default, which suffices."""
    enough = default_size(targets, view)
    if size[0] <= enough[0] and size[1] <= enough[1]:
        return None
    ratio = size[0] * size[1] / (enough[0] * enough[1])
    return (
        f"student size {size[0]}x{size[1]} has {ratio:.3g} times the pixels of "
        f"{enough[0]}x{enough[1]}, which suffices for this view and its finest tap; a smaller "
        "`student_size` makes steps faster"
    )


def noise_line(objective: TeachersObjective, options: TrainOptions) -> str | None:
    """Return why noise is weighted tap by tap and not band by band, if it is."""
    if not options.noise_weighting or objective.weights_bands:
        return None
    why = "crops mix a map's bands" if options.scale is not None else "a float16 cache has no bands"
    return f"noise weighting: tap by tap ({why})"


def teacher_lines(teachers: Sequence[TeacherTargets], options: TrainOptions) -> list[str]:
    """Return a line per teacher if there are several: its name, network and taps."""
    if len(teachers) < 2:
        return []
    lines = []
    for teacher in teachers:
        names = ", ".join(name.removeprefix(f"{teacher.name}/") for name in teacher.names)
        twins = [
            other.name
            for other in teachers
            if other is not teacher and other.weights_sha256 == teacher.weights_sha256
        ]
        same = f"; the same weights as {', '.join(twins)}" if twins else ""
        lines.append(f"teacher {teacher.name}: {teacher.architecture}, {names}{same}")
    return lines


def crops_line(teachers: Sequence[TeacherTargets], options: TrainOptions) -> str | None:
    """Return the teachers' error under crops if the run crops and the caches have measured it."""
    measured = {name: error for t in teachers for name, error in t.crop_error.items()}
    if options.scale is None or not measured:
        return None
    errors = ", ".join(f"{name} {error:.3f}" for name, error in measured.items())
    return (
        "crops: the teacher's features of a crop differ from the cropped features by "
        f"{errors} (measured relative squared error at the time of extraction: 0 follows "
        "exactly, 2 is unrelated)"
    )


class Pace:
    """Estimates the time of a run from its first steps, and prints the estimate once."""

    def __init__(self, steps: int, device: torch.device, *, shown: bool) -> None:
        """Estimate the time of `steps` steps on a device; print nothing if not `shown`."""
        self._left = steps
        self._device = device
        self._shown = shown
        self._ends: list[float] = []

    def stepped(self) -> None:
        """Count a step. After the timed ones, print the estimate unless little time is left."""
        self._left -= 1
        if len(self._ends) == WARM_UP_STEPS + TIMED_STEPS:
            return
        self._ends.append(time.monotonic())
        if len(self._ends) < WARM_UP_STEPS + TIMED_STEPS:
            return
        timed = self._ends[WARM_UP_STEPS - 1 :]
        # The median leaves out an evaluation or a checkpoint between two steps.
        seconds = statistics.median(after - before for before, after in pairwise(timed))
        if self._shown and seconds * self._left >= LEAST_SECONDS:
            say(
                f"about {duration(seconds * self._left)} for the {self._left:,} steps left, "
                f"{seconds:.2g} s each, and for evaluation more; memory so far: at most "
                f"{byte_size(peak_bytes(self._device))}"
            )
