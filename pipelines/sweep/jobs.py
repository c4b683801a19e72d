"""The jobs of a sweep: what one process does at a time. Importing this module loads no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from dtcache.errors import ConfigError, DtcacheError, TrainingError, one_line
from dtcache.options import (
    EvaluateOptions,
    ExtractOptions,
    ImagesOptions,
    LabelFitOptions,
    LabelWriteOptions,
)
from dtcache.recipe import Json
from dtcache.store.layout import MANIFEST
from pipelines.runs.folder import BACKBONE
from pipelines.sweep.records import Step, finished, perform
from pipelines.sweep.students import Student
from pipelines.sweep.sweep_file import RUN_HEAD

COMPUTED_ON = ("device", "scheduler", "workers", "dashboard", "skip_disk_check", "max_failures")
"""Options of extractions and evaluations that may change on resume."""


class Job(Protocol):
    """A piece of work that one process does; doing it again does what is missing."""

    @property
    def name(self) -> str:
        """Name of the job in messages and of its log file, such as `runs/mse/seed-0`."""

    @property
    def after(self) -> frozenset[str]:
        """Names of the jobs that must be finished first."""

    def steps(self) -> Iterator[Step]:
        """Yield the steps of the job."""

    def timed(self, kind: str) -> float | None:
        """Return about how long a step of a kind takes, from a try; None if that is not known."""

    def do(self) -> None:
        """Do the steps that are missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheJob:
    """Makes a cache of the sweep: extraction, and a label set if there is one."""

    name: str
    after: frozenset[str] = frozenset()
    record: Path
    cache: Path
    images: Path
    extract: ExtractOptions
    interpreter: Path | None = None
    fit: LabelFitOptions | None = None
    write: LabelWriteOptions | None = None

    def steps(self) -> Iterator[Step]:
        """Yield the one step."""
        identity = {**_lasting(asdict(self.extract)), "images": str(self.images)}
        if self.fit is not None and self.write is not None:
            identity["label.fit"] = _lasting(asdict(self.fit))
            identity["label.write"] = _lasting(asdict(self.write))
        yield Step(
            title=self.name,
            kind=self.name,
            record=self.record,
            identity=identity,
            output=self.cache / MANIFEST,
        )

    def timed(self, kind: str) -> None:
        """Return None: `dtcache extract --dry-run` estimates an extraction."""

    def do(self) -> None:
        """Extract the cache, fit the interpreter and write its labels."""
        perform(list(self.steps()), lambda: [self._made()])

    def _made(self) -> Json:
        from pipelines.extract.extract import extract
        from pipelines.label.fit_interpreter import fit_interpreter
        from pipelines.label.write_labels import write_labels

        done = extract(self.images, self.cache, self.extract)
        if self.interpreter is not None and self.fit is not None and self.write is not None:
            if not self.interpreter.exists():
                fit_interpreter(self.cache, self.interpreter, self.fit)
            write_labels(self.cache, self.interpreter, self.write)
        return {"num_done": done.num_done}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One evaluation of a student."""

    task: str
    seed: int
    options: EvaluateOptions
    """With the seed."""
    record: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One student of the sweep, and its evaluations."""

    arm: str
    seed: int | None
    """None for a backbone that all seeds share."""
    after: frozenset[str]
    """Names of the jobs that must be finished first."""
    folder: Path
    """The run folder."""
    record: Path
    student: Student
    identity: Json
    """Everything that the student depends on, by field."""
    evaluations: tuple[Evaluation, ...]

    @property
    def title(self) -> str:
        """The run in words."""
        return f"arm {self.arm}" if self.seed is None else f"arm {self.arm}, seed {self.seed}"

    def steps(self) -> Iterator[Step]:
        """Yield the making of the student and its evaluations."""
        yield self.making()
        yield from (self.evaluating(evaluation) for evaluation in self.evaluations)

    def making(self) -> Step:
        """Return the step that makes the student."""
        return Step(
            title=self.title,
            kind=f"arm {self.arm}",
            record=self.record,
            identity=self.identity,
            output=self.folder / BACKBONE / "config.json",
        )

    def evaluating(self, evaluation: Evaluation) -> Step:
        """Return the step of one evaluation."""
        return Step(
            title=f"{self.title}, {evaluation.task} (seed {evaluation.seed})",
            kind=f"task {evaluation.task}",
            record=evaluation.record,
            identity=_lasting(evaluation.options.identity()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunJob:
    """Makes one student, or several that train on one loader, and evaluates them."""

    name: str
    after: frozenset[str]
    runs: tuple[Run, ...]

    def steps(self) -> Iterator[Step]:
        """Yield the making and the evaluations of each student."""
        for run in self.runs:
            yield from run.steps()

    def timed(self, kind: str) -> float | None:
        """Return the time of a training, from a few steps; None for other steps."""
        students = [run.student for run in self.runs if run.making().kind == kind]
        return students[0].seconds() if students else None

    def do(self) -> None:
        """Make the students, then evaluate each one.

        If the losses of some students are not finite, the others are evaluated first. Raises what
        making and evaluating raise.
        """
        # Loaded before a step's time is counted: a process loads them once for many jobs.
        import pipelines.evaluate.evaluate
        import pipelines.train.train  # noqa: F401

        failures = self._make([run for run in self.runs if finished(run.making()) is None])
        for run in self.runs:
            if run.folder not in failures:
                for evaluation in run.evaluations:
                    _evaluate(run, evaluation)
        reasons = [
            (f"{run.title}: " if len(self.runs) > 1 else "") + one_line(failures[run.folder])
            for run in self.runs
            if run.folder in failures
        ]
        if reasons:
            raise TrainingError("; ".join(reasons))

    def _make(self, runs: Sequence[Run]) -> dict[Path, DtcacheError]:
        """Make students; return, by run folder, why some could not be made."""
        failures: dict[Path, DtcacheError] = {}

        def work() -> list[Json | None]:
            failures.update(_made_together(runs) if len(runs) > 1 else _made_apart(runs))
            return [None if run.folder in failures else {} for run in runs]

        if runs:
            perform([run.making() for run in runs], work)
        return failures


def _made_together(runs: Sequence[Run]) -> dict[Path, DtcacheError]:
    """Train students on one loader; return, by run folder, why some could not be trained."""
    from pipelines.train.train import StudentsError, train_shared

    loadings = [(run.folder, run.student.loading()) for run in runs]
    trainings = [(out, loading) for out, loading in loadings if loading is not None]
    try:
        train_shared(trainings[0][1].where, [(out, loading.options) for out, loading in trainings])
    except StudentsError as error:
        return {**error.failures}
    except ConfigError:
        # One of the students cannot be built: it must not stop the others.
        return _made_apart(runs)
    return {}


def _made_apart(runs: Sequence[Run]) -> dict[Path, DtcacheError]:
    """Make students one after the other; return, by run folder, why some could not be made."""
    failures: dict[Path, DtcacheError] = {}
    for run in runs:
        try:
            run.student.make(run.folder)
        except DtcacheError as error:
            failures[run.folder] = error
    return failures


def _evaluate(run: Run, evaluation: Evaluation) -> None:
    def work() -> list[Json]:
        from pipelines.evaluate.evaluate import evaluate

        options = evaluation.options
        if options.head == RUN_HEAD:
            options = replace(options, head=str(run.folder))
        return [evaluate(str(run.folder / BACKBONE), options).to_json()]

    perform([run.evaluating(evaluation)], work)


def _lasting(options: Json) -> Json:
    # Options of reading images at their defaults equal None: older records have no such options.
    defaults = asdict(ImagesOptions())
    return {
        name: None if name in defaults and value == defaults[name] else value
        for name, value in options.items()
        if name not in COMPUTED_ON
    }
