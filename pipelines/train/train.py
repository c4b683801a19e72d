"""Stage 2: train students on a teacher's features, cached or computed in the loop."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from dtcache.atomic_files import FolderLock
from dtcache.device import Compute
from dtcache.device_memory import memory_errors
from dtcache.distributed import Processes, join_processes
from dtcache.errors import ConfigError, TrainingError
from dtcache.options import TrainOptions
from dtcache.process_settings import configure_process
from dtcache.store.remote import Location, RemoteCache
from pipelines.runs.clock import Clock
from pipelines.terminal.output import say
from pipelines.terminal.progress import track
from pipelines.train.batch_source import BatchSource
from pipelines.train.cached_batches import CachedSource
from pipelines.train.remarks import Pace, remarks
from pipelines.train.shared_loader import common_epochs, require_one_loader
from pipelines.train.student_run import StudentRun, Trained
from pipelines.train.trainer import accumulate, evaluate


class StudentsError(TrainingError):
    """Students of a shared loader whose loss was not finite; the other students are trained."""

    def __init__(self, failures: dict[Path, TrainingError], count: int) -> None:
        """Describe the failures, by run folder, among `count` students."""
        reasons = "; ".join(f"{out.name}: {error}" for out, error in failures.items())
        rest = ", the others are trained" if len(failures) < count else ""
        super().__init__(f"{len(failures)} of {count} students failed{rest}: {reasons}")
        self.failures = failures


def train(where: Sequence[Location], out: Path, options: TrainOptions) -> Trained:
    """Train a student on the caches `where`, or with `teacher` on images, and export its backbone.

    Resumes a run with the same options in `out`. Under torchrun every process calls this, and the
    first one writes `out`. Raises TrainingError, naming the samples, if the loss is not finite, and
    the errors of opening the cache or the teacher.
    """
    return train_shared(where, [(out, options)])[0]


def train_shared(
    where: Sequence[Location], runs: Sequence[tuple[Path, TrainOptions]]
) -> list[Trained]:
    """Train one student per (folder, options) as `train` does, all from one loader.

    Each batch is read and decoded, or computed by the teacher, once for all students. On a CPU each
    student's losses equal to the bit those that it has alone. Only the options PER_STUDENT may
    differ. Each run resumes from its own checkpoint; a finished run is not repeated. If a loss is
    not finite, that student ends, and TrainingError is raised after the others have ended:
    StudentsError if there are several students. Raises ConfigError, before anything is written, if
    the runs cannot share a loader.
    """
    runs = [(out, _with_shuffle(where, each)) for out, each in runs]
    require_one_loader(runs)
    options = runs[0][1]
    processes, compute = join_processes(options.device, options.precision)
    configure_process(compute.device)
    source = open_source(where, options, compute, processes)
    students = [StudentRun(out, each, source, compute, processes) for out, each in runs]
    epochs_before = common_epochs(students)
    total = students[0].trainer.total_steps
    with ExitStack() as locks:
        _begin(students, processes, locks)
        with ExitStack() as stack:
            done = min(run.trainer.steps_done for run in students)
            remedy = "pass a smaller `batch_size` or more `micro_batches`"
            stack.enter_context(memory_errors(students[0].trainer.micro_batch_size, remedy))
            for run in students:
                stack.enter_context(run)
            title = options.student if len(students) == 1 else f"{len(students)} students"
            progress = stack.enter_context(
                track(f"train {title}", total, done, shown=processes.is_first)
            )
            pace = Pace(total - done, compute.device, shown=processes.is_first)
            while active := [run for run in students if run.is_active]:
                # After a kill, checkpoints may stand at different steps. The last one goes first.
                step = min(run.trainer.steps_done for run in active)
                epoch, start = divmod(step, source.num_batches)
                micro_batches = source.epoch(epochs_before + epoch, start)
                for batches in _arriving(micro_batches, step, options.micro_batches, active):
                    due = [run for run in active if run.is_due(step)]
                    if not due:  # the students that this step was for have failed
                        break
                    accumulate(source, [run.trainer for run in due], batches)
                    losses = [run.update(batches) for run in due]
                    step += 1
                    progress.advance(1, _note(losses, due[0].trainer.clock))
                    pace.stepped()
                ended = [run for run in due if run.failure is None]
                if ended:
                    trainers = [run.trainer for run in ended]
                    lines = evaluate(source, trainers) if processes.is_first else [{}] * len(ended)
                    for run, line in zip(ended, lines, strict=True):
                        run.end_epoch(line)
            trained = [run.finish() for run in students if run.failure is None]
        _raise_failures(students)
    return trained


def _with_shuffle(where: Sequence[Location], options: TrainOptions) -> TrainOptions:
    """Return the options with the shuffle that suits the caches, if they name none.

    It is recorded with the run, so that a resume from another place keeps the order.
    """
    if options.shuffle is not None:
        return options
    is_remote = any(isinstance(location, RemoteCache) for location in where)
    return replace(options, shuffle="block" if is_remote else "full")


def open_source(
    where: Sequence[Location], options: TrainOptions, compute: Compute, processes: Processes
) -> BatchSource:
    """Return the batches of caches or, if the options name a teacher, of a teacher in the loop."""
    if options.teacher is None:
        return CachedSource(where, options, compute, processes)
    images = where[0]
    if len(where) > 1:
        raise ConfigError(
            f"`teacher`: expected one source of images with a teacher in the loop, got {len(where)}"
            "; pass one, or leave `teacher` out to train on caches"
        )
    if isinstance(images, RemoteCache):
        raise ConfigError(
            f"{images}: expected images on this machine, since a teacher computes their features; "
            "leave `teacher` out to train on a cache"
        )
    from pipelines.train.online_batches import OnlineSource

    return OnlineSource(images, options, compute, processes)


def _begin(students: Sequence[StudentRun], processes: Processes, locks: ExitStack) -> None:
    """Lock and claim the folders, resume from the checkpoints, and print remarks.

    If an error ends `locks`, the folder of a run without a step is as it was before.
    """
    if processes.is_first:
        for run in students:
            run.check_folder()  # before any folder is begun
        for run in students:
            run.begin(locks.enter_context(FolderLock(run.out)))
    processes.wait()
    names: dict[str, list[str]] = {}
    for run in students:
        run.trainer.restore(run.out)
        for line in remarks(run.trainer, run.options) if run.is_active else ():
            names.setdefault(line, []).append(run.out.name)
    if processes.is_first:
        for line, of_runs in names.items():
            concerned = "" if len(of_runs) == len(students) else f"{', '.join(of_runs)}: "
            say(concerned + line)


def _arriving(
    micro_batches: Iterable[Any], step: int, per_step: int, runs: Sequence[StudentRun]
) -> Iterator[list[Any]]:
    """Yield the global batches of an epoch from `step` on, as lists of `per_step` micro-batches.

    The runs' clocks count the time until each batch arrives. The clock of a run that is ahead of
    `step` does not count the time before the run's own next step.
    """
    batches = _grouped(micro_batches, per_step)
    for run in runs:
        batches = run.trainer.clock.waiting(batches)
    for number, batch in enumerate(batches, step):
        ahead = [run for run in runs if run.trainer.steps_done > number]
        yield batch
        for run in ahead:
            run.trainer.clock.restart()


def _grouped(micro_batches: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Yield lists of `count` micro-batches; each list is one global batch."""
    left = iter(micro_batches)
    while group := list(islice(left, count)):
        yield group


def _note(losses: Sequence[float], clock: Clock) -> str:
    """Return what the progress shows beside the rate: every student's loss, speed, waiting."""
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    return f"loss {shown}; {clock.rate:.0f} images/s, {clock.share:.0%} waiting"


def _raise_failures(students: Sequence[StudentRun]) -> None:
    """Raise the error of the students that have failed, if any."""
    failures = {run.out: run.failure for run in students if run.failure is not None}
    if not failures:
        return
    if len(students) == 1:
        raise next(iter(failures.values()))
    raise StudentsError(failures, len(students))
