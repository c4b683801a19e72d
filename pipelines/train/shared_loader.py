"""The runs that share a loader: their folders, and the options that they must have in common."""

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from dtcache.errors import CacheMismatchError, ConfigError
from dtcache.options import TrainOptions
from dtcache.options.train import MOST_COMPILED, PER_STUDENT, SEVERAL_PER_PROCESS
from pipelines.runs.folder import RUN
from pipelines.runs.trackers import require_tracker
from pipelines.train.student_run import StudentRun


def runs_of(out: Path, options: TrainOptions) -> list[tuple[Path, TrainOptions]]:
    """Return the folder and the options of each run that `student`, one or several names, means.

    One student has the folder `out`; each of several students, separated by commas, has the folder
    `out/<student>`, and with `extend` it extends the run `extend/<student>`. Raises ConfigError if
    a name cannot be a folder's or comes twice, and CacheMismatchError if `out` itself holds a run
    of one student.
    """
    if "," not in options.student:
        return [(out, options)]
    names = [name.strip() for name in options.student.split(",")]
    for number, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ConfigError(
                f"`student` {options.student}: expected names that can be names of folders, got "
                f"{name!r}; train that student alone"
            )
        if name in names[:number]:
            raise ConfigError(f"`student` {options.student}: {name} comes twice; pass it once")
    if (out / RUN).exists():
        raise CacheMismatchError(
            f"{out} holds the run of one student, got {len(names)} students; pass a new `out`"
        )
    return [(out / name, _for_student(options, name)) for name in names]


def _for_student(options: TrainOptions, name: str) -> TrainOptions:
    """Return the options of one of several students: it extends the run of its own name."""
    extend = None if options.extend is None else options.extend / name
    return replace(options, student=name, extend=extend)


def require_one_loader(runs: Sequence[tuple[Path, TrainOptions]]) -> None:
    """Raise ConfigError, naming the field, if the runs cannot have the same batches."""
    if not runs:
        raise ConfigError("`runs`: expected at least one folder with its options, got none")
    first_out, first = runs[0]
    if first.compile and len(runs) > MOST_COMPILED:
        raise ConfigError(
            f"`compile`: expected at most {MOST_COMPILED} students on a loader, got {len(runs)}; "
            "leave it out, or train fewer students at a time"
        )
    shared = [f.name for f in fields(TrainOptions) if f.name not in PER_STUDENT]
    folders: set[Path] = set()
    for out, options in runs:
        if out.resolve() in folders:
            raise ConfigError(f"`runs`: {out} is the folder of two runs; pass one for each run")
        folders.add(out.resolve())
        pairs = {name: (getattr(first, name), getattr(options, name)) for name in shared}
        if (first.feature_weight == 0) != (options.feature_weight == 0):
            # Without a feature loss a batch has no features.
            pairs["feature_weight"] = (first.feature_weight, options.feature_weight)
        for name, (expected, value) in pairs.items():
            if value != expected:
                raise ConfigError(
                    f"`{name}`: expected one value for all students of a loader, got {expected!r} "
                    f"for {first_out.name} and {value!r} for {out.name}; train them apart"
                )
        if len(runs) > 1 and options.log_with not in SEVERAL_PER_PROCESS:
            raise ConfigError(
                f"`log_with` {options.log_with}: expected {' or '.join(SEVERAL_PER_PROCESS)} for "
                "several students, as this tracker logs one run per process"
            )
        require_tracker(options.log_with)


def common_epochs(students: Sequence[StudentRun]) -> int:
    """Return the epochs of the runs that the students extend, which order and views continue after.

    Raises ConfigError if the students of a loader differ in them.
    """
    first = students[0]
    for run in students:
        if run.trainer.epochs_before != first.trainer.epochs_before:
            raise ConfigError(
                f"`extend`: expected runs of equally many epochs for all students of a loader, got "
                f"{first.trainer.epochs_before} for {first.out.name} and "
                f"{run.trainer.epochs_before} for {run.out.name}; train them apart"
            )
    return first.trainer.epochs_before
