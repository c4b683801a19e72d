"""The plan of a sweep: its jobs and runs, compared with what is done already."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtcache.errors import CacheIncompleteError, ConfigError
from dtcache.options.train import ONLINE_ONLY
from dtcache.recipe import Json
from dtcache.store.layout import SAMPLES
from dtcache.store.manifest import read_manifest
from dtcache.store.remote import Location, folder_of, label_set_location
from pipelines.sweep.jobs import (
    CacheJob,
    Evaluation,
    Job,
    Run,
    RunJob,
)
from pipelines.sweep.records import finished
from pipelines.sweep.students import OtherBackbone, RandomStart, Source, Student, TrainedStudent
from pipelines.sweep.sweep_file import Arm, CacheEntry, SweepFile

FIXED = "fixed"
"""Run folder of a backbone that all seeds share, in place of `seed-N`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that a sweep does, and where."""

    file: SweepFile
    out: Path
    jobs: tuple[Job, ...]
    """Every job, finished or not. A job comes after those that it needs."""
    runs: tuple[Run, ...]
    """Every student, arm by arm."""

    def log(self, job: Job) -> Path:
        """Return the file that a job's output goes to."""
        return self.out / "logs" / f"{job.name}.log"

    def left(self) -> list[Job]:
        """Return the jobs that are not finished.

        Raises CacheMismatchError, naming arm and field, if a step was done with other options.
        """
        # Every record is read, so that a changed option is found in finished jobs too.
        records = {job.name: [finished(step) for step in job.steps()] for job in self.jobs}
        return [job for job in self.jobs if None in records[job.name]]


def plan_sweep(file: SweepFile, out: Path) -> Plan:
    """Return the plan of a sweep in the folder `out`; nothing is written.

    Seeds come before arms, so that every finished seed adds a pair to each comparison. Raises
    ConfigError, CacheIncompleteError, and what reading a manifest raises, if a cache of the file
    cannot be used.
    """
    return _Planner(file, out.absolute()).plan()


class _Planner:
    def __init__(self, file: SweepFile, out: Path) -> None:
        self._file = file
        self._out = out
        self._caches: dict[str, CacheJob] = {}
        """By name, the caches that the sweep makes and that a run needs."""

    def plan(self) -> Plan:
        """Return the plan."""
        runs = [
            self._run(arm, seed)
            for seed in self._file.seeds
            for arm in self._file.arms
            if arm.backbone is None or seed == self._file.seeds[0]
        ]
        jobs = [
            RunJob(
                name=_name(group),
                after=frozenset(name for run in group for name in run.after),
                runs=tuple(group),
            )
            for group in self._groups(runs)
        ]
        order = [arm.name for arm in self._file.arms]
        return Plan(
            file=self._file,
            out=self._out,
            jobs=(*self._caches.values(), *jobs),
            runs=tuple(sorted(runs, key=lambda run: order.index(run.arm))),
        )

    def _groups(self, runs: Sequence[Run]) -> Iterable[list[Run]]:
        """Return the runs, those together that train on one loader."""
        groups: dict[object, list[Run]] = {}
        for number, run in enumerate(runs):
            loading = run.student.loading() if self._file.share else None
            groups.setdefault(number if loading is None else loading.batches, []).append(run)
        return groups.values()

    def _run(self, arm: Arm, seed: int) -> Run:
        folder = FIXED if arm.backbone is not None else f"seed-{seed}"
        records = self._out / "records" / "runs" / arm.name / folder
        student, after = self._student(arm, seed)
        return Run(
            arm=arm.name,
            seed=None if arm.backbone is not None else seed,
            after=after,
            folder=self._out / "runs" / arm.name / folder,
            record=records / "student.json",
            student=student,
            identity=student.identity(),
            evaluations=tuple(
                Evaluation(
                    task=task.name,
                    seed=number,
                    options=replace(task.options, seed=number),
                    record=records / f"task-{task.name}-seed-{number}.json",
                )
                for task in self._file.tasks
                if task.has(arm.name)
                for number in task.seeds
            ),
        )

    def _student(self, arm: Arm, seed: int) -> tuple[Student, frozenset[str]]:
        """Return an arm's student of one seed, and the names of the jobs that it needs."""
        options = replace(arm.train, seed=seed)
        other = OtherBackbone(backbone=str(arm.backbone), options=options, source=None)
        # Arms that do not train take view and held-out samples from the first one that does.
        trains = arm if arm.trains else next((a for a in self._file.arms if a.trains), None)
        if trains is None or (arm.backbone is not None and other.folder is not None):
            return other, frozenset()
        source, after = self._source(trains, seed)
        if arm.trains:
            return TrainedStudent(source=source, options=options), after
        # They open its data, which may need a teacher in the loop.
        online = {name: getattr(trains.train, name) for name in ("teacher", *ONLINE_ONLY)}
        options = replace(options, timestep=trains.train.timestep, **online)
        if arm.start is not None:
            return RandomStart(source=source, options=options), after
        return OtherBackbone(backbone=str(arm.backbone), options=options, source=source), after

    def _source(self, arm: Arm, seed: int) -> tuple[Source, frozenset[str]]:
        """Return the data that an arm trains on, and the names of the jobs that make it."""
        identity: Json
        if arm.images is not None:
            identity = {"images": str(arm.images), "teacher": arm.train.teacher}
            return Source(where=(arm.images,), identity=identity), frozenset()
        where: list[Location] = []
        identities: list[Json] = []
        after = set()
        for number, name in enumerate(arm.caches):
            entry = self._file.cache(name)
            if entry.path is not None:
                labels = arm.train.labels if number == 0 else None
                where.append(entry.path)
                identities.append(_identity(entry, entry.path, labels, arm.train.allow_incomplete))
            else:
                job = self._cache(entry, seed)
                where.append(job.cache)
                identities.append({"cache": job.name})
                after.add(job.name)
        identity = identities[0] if len(identities) == 1 else {"caches": identities}
        return Source(where=tuple(where), identity=identity), frozenset(after)

    def _cache(self, entry: CacheEntry, seed: int) -> CacheJob:
        """Return the job that makes a cache, one for all runs that need it."""
        place = f"{entry.name}/seed-{seed}" if entry.per_seed else entry.name
        name = f"caches/{place}"
        if name not in self._caches:
            if entry.images is None or entry.extract is None:
                raise ConfigError(f"cache {entry.name}: expected a path or [cache.extract]")
            self._caches[name] = CacheJob(
                name=name,
                record=self._out / "records" / f"{name}.json",
                cache=self._out / name,
                images=entry.images,
                extract=replace(entry.extract, seed=seed) if entry.per_seed else entry.extract,
                interpreter=self._out / "interpreters" / place if entry.fit else None,
                fit=replace(entry.fit, seed=seed) if entry.fit and entry.per_seed else entry.fit,
                write=entry.write,
            )
        return self._caches[name]


def _identity(
    entry: CacheEntry, path: Location, labels: str | None, allow_incomplete: bool
) -> Json:
    """Return the hashes of a sealed cache, as `dtcache train` records them in a run."""
    manifest = read_manifest(folder_of(path))
    if manifest.state != "sealed" and not allow_incomplete:
        raise CacheIncompleteError(
            f"cache {entry.name}: {path} is not complete; run its dtcache extract again"
        )
    identity: Json = {"cache": manifest.fingerprint, "samples": manifest.files.get(SAMPLES)}
    if labels is not None:
        label_set = folder_of(label_set_location(path, labels))
        identity["label_set"] = read_manifest(label_set).identity
    return identity


def _name(runs: Sequence[Run]) -> str:
    """Return the name of the job of some runs, which is the name of a file too."""
    more = f"+{len(runs) - 1}" if len(runs) > 1 else ""
    return f"runs/{runs[0].arm}{more}/{runs[0].folder.name}"
