"""The file of a sweep: caches, arms, seeds and tasks, checked before anything runs."""

import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dtcache.arguments import is_address
from dtcache.errors import ConfigError
from dtcache.options import (
    EvaluateOptions,
    ExtractOptions,
    LabelFitOptions,
    LabelWriteOptions,
    TrainOptions,
)
from dtcache.options.evaluate import TASKS
from dtcache.options.field import MAX_SEED, Options
from dtcache.options.toml import options_from, read_toml, require_names
from dtcache.store.remote import Location, location_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SECTIONS = ("seeds", "baseline", "share", "train", "cache", "arm", "evaluate")
CACHE = ("name", "path", "per_seed", "extract", "label")
SOURCES = ("cache", "images", "start", "backbone")
"""What an arm's students come from. Each arm has exactly one."""
ARM = ("name", *SOURCES, "train")
TEACHER_AND_CACHE = (
    "a cache has its own; pass images in place of cache to run the teacher in the loop"
)
RUN_HEAD = "run"
"""Value of a task's `head`: the head that each run has trained on labels."""
TRAINING = "training"
"""Task of the losses that training itself measures; no task of the file may have this name."""

Named = TypeVar("Named", "CacheEntry", "Arm")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheEntry:
    """A `[[cache]]`: a sealed cache, or the options with which the sweep makes one."""

    name: str
    path: Location | None = None
    """A sealed cache that exists."""
    per_seed: bool = False
    """Make one cache per seed of the sweep; its extraction and its interpreter have that seed."""
    images: Path | None = None
    """Images to extract from, if the sweep makes the cache."""
    extract: ExtractOptions | None = None
    fit: LabelFitOptions | None = None
    """Options of the interpreter whose labels are written into the cache, if any."""
    write: LabelWriteOptions | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """An `[[arm]]`: students that differ in their seeds alone. One of the four sources is set."""

    name: str
    train: TrainOptions
    """The common options and the arm's own; the seed is that of a run."""
    caches: tuple[str, ...] = ()
    """Names of the caches that the students train on together."""
    images: Path | None = None
    """Images that the students train on, with a teacher in the loop."""
    start: str | None = None
    """`random`: the weights that the trained students of the same seed start from."""
    backbone: str | None = None
    """A backbone folder, a run, or a timm name (timm's pretrained weights); one for all seeds."""

    @property
    def trains(self) -> bool:
        """Whether the arm trains its students."""
        return bool(self.caches) or self.images is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """An `[evaluate.NAME]`: options of `dtcache evaluate`, and seeds of the evaluation."""

    name: str
    options: EvaluateOptions
    seeds: tuple[int, ...]
    """Each student is evaluated once per seed; the mean of its scores counts."""
    arms: tuple[str, ...] | None = None
    """The arms that are evaluated; None for all."""

    def has(self, arm: str) -> bool:
        """Return whether the students of an arm are evaluated."""
        return self.arms is None or arm in self.arms


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepFile:
    """A sweep file, checked."""

    path: Path
    seeds: tuple[int, ...]
    baseline: str
    """Name of the arm that the others are compared with."""
    share: bool
    caches: tuple[CacheEntry, ...]
    arms: tuple[Arm, ...]
    tasks: tuple[Task, ...]

    @property
    def folder(self) -> Path:
        """The folder that relative paths of the file start from."""
        return self.path.absolute().parent

    def cache(self, name: str) -> CacheEntry:
        """Return the cache of a name."""
        return next(cache for cache in self.caches if cache.name == name)


def read_sweep(path: Path) -> SweepFile:
    """Read and check a sweep file.

    Raises ConfigError, naming the section, for a file that is not TOML, an unknown or missing
    option, a value out of bounds, a name twice, or paths that do not exist.
    """
    table = read_toml(path)
    require_names(table, SECTIONS, str(path))
    folder = path.absolute().parent
    seeds = _seeds(table.get("seeds"), f"{path}: seeds")
    caches = _unique(
        [_cache(entry, title, folder) for entry, title in _entries(table, "cache", path)],
        f"{path}: [[cache]]",
    )
    common = _table(table.get("train", {}), f"{path}: [train]")
    require_options(common, TrainOptions, f"{path}: [train]")
    arms = _unique(
        [_arm(entry, title, folder, common) for entry, title in _entries(table, "arm", path)],
        f"{path}: [[arm]]",
    )
    _require_sources(path, caches, arms)
    tasks = tuple(
        _task(name, task, f"{path}: [evaluate.{name}]", folder, arms)
        for name, task in _table(table.get("evaluate", {}), f"{path}: [evaluate]").items()
    )
    baseline = table.get("baseline", arms[0].name)
    if baseline not in [arm.name for arm in arms]:
        raise ConfigError(
            f"{path}: baseline {baseline!r}: expected an arm; "
            f"the arms are {', '.join(arm.name for arm in arms)}"
        )
    return SweepFile(
        path=path,
        seeds=seeds,
        baseline=baseline,
        share=_bool(table.get("share", False), f"{path}: share"),
        caches=caches,
        arms=arms,
        tasks=tasks,
    )


def require_options(table: Mapping[str, Any], options: type[Options], title: str) -> None:
    """Raise ConfigError for a name that is no option of a sweep.

    A sweep lists its seeds, and its students start from the weights of their seed.
    """
    if "seed" in table:
        raise ConfigError(f"{title}: seed: expected no seed here; list the seeds in `seeds`")
    if "extend" in table:
        raise ConfigError(
            f"{title}: extend: expected no finished run here, as a sweep trains each student from "
            "its start; extend a run with dtcache train, and compare its backbone in an [[arm]]"
        )
    require_names(table, typing.get_type_hints(options), title)


def _cache(table: Mapping[str, Any], title: str, folder: Path) -> CacheEntry:
    require_names(table, CACHE, title)
    name = _name(table, title)
    title = f"{title} {name}"
    if ("path" in table) == ("extract" in table):
        raise ConfigError(f"{title}: expected either path (a sealed cache) or [cache.extract]")
    if "path" in table:
        extra = [key for key in ("label", "per_seed") if key in table]
        if extra:
            raise ConfigError(f"{title}: {extra[0]}: only a cache with [cache.extract] has it")
        text = _text(table["path"], f"{title}: path")
        return CacheEntry(
            name=name, path=location_of("path", text if is_address(text) else folder / text)
        )
    extract = dict(_table(table["extract"], f"{title}: [cache.extract]"))
    if "images" not in extract:
        raise ConfigError(f"{title}: [cache.extract]: images missing; pass the images to cache")
    images = folder / _text(extract.pop("images"), f"{title}: images")
    _require_path(images, f"{title}: images")
    per_seed = _bool(table.get("per_seed", False), f"{title}: per_seed")
    label = _table(table.get("label", {}), f"{title}: [cache.label]")
    require_names(label, ("fit", "write"), f"{title}: [cache.label]")
    if label and set(label) != {"fit", "write"}:
        raise ConfigError(f"{title}: expected both [cache.label.fit] and [cache.label.write]")
    label_fit = _table(label.get("fit", {}), f"{title}: [cache.label.fit]")
    label_write = _table(label.get("write", {}), f"{title}: [cache.label.write]")
    if per_seed:
        for part, inner in (("extract", extract), ("label.fit", label_fit)):
            require_options(
                inner,
                ExtractOptions if part == "extract" else LabelFitOptions,
                f"{title}: [cache.{part}]",
            )
    options = options_from(
        ExtractOptions, extract, title=f"{title}: [cache.extract]", folder=folder
    )
    if not options.teacher:
        raise ConfigError(f"{title}: [cache.extract]: teacher missing; pass a folder or an id")
    fit = write = None
    if label:
        fit = options_from(
            LabelFitOptions, label_fit, title=f"{title}: [cache.label.fit]", folder=folder
        )
        write = options_from(
            LabelWriteOptions, label_write, title=f"{title}: [cache.label.write]", folder=folder
        )
        if not write.name:
            raise ConfigError(f"{title}: [cache.label.write]: name missing; name the label set")
    return CacheEntry(
        name=name,
        per_seed=per_seed,
        images=images,
        extract=replace(options, teacher=existing(folder, options.teacher)),
        fit=fit,
        write=write,
    )


def _arm(table: Mapping[str, Any], title: str, folder: Path, common: Mapping[str, Any]) -> Arm:
    require_names(table, ARM, title)
    name = _name(table, title)
    title = f"{title} {name}"
    sources = [key for key in SOURCES if key in table]
    if len(sources) != 1:
        got = ", ".join(sources) or "none of them"
        raise ConfigError(f"{title}: expected exactly one of {', '.join(SOURCES)}; got {got}")
    own = _table(table.get("train", {}), f"{title}: [arm.train]")
    require_options(own, TrainOptions, f"{title}: [arm.train]")
    options = options_from(
        TrainOptions, {**common, **own}, title=f"{title}: [train] and [arm.train]", folder=folder
    )
    if "," in options.student:
        raise ConfigError(
            f"{title}: student {options.student!r}: expected one name; write an [[arm]] for each"
        )
    if options.init not in (None, "pretrained"):
        options = replace(options, init=str(folder / options.init))
    if options.teacher is not None:
        options = replace(options, teacher=existing(folder, options.teacher))
    if sources == ["cache"]:
        if options.teacher is not None:
            raise ConfigError(f"{title}: teacher: {TEACHER_AND_CACHE}")
        given = table["cache"]
        names = tuple(
            _text(item, f"{title}: cache")
            for item in (given if isinstance(given, list) else [given])
        )
        if not names:
            raise ConfigError(f"{title}: cache: expected one or more names, got none")
        return Arm(name=name, train=options, caches=names)
    source = {key: _text(table[key], f"{title}: {key}") for key in sources}
    if "images" in source:
        images = folder / source["images"]
        _require_path(images, f"{title}: images")
        if options.teacher is None:
            raise ConfigError(
                f"{title}: images: expected a teacher in [arm.train] with it, which runs in the "
                "loop; or pass cache"
            )
        return Arm(name=name, train=options, images=images)
    if source.get("start", "random") != "random":
        raise ConfigError(f'{title}: start {source["start"]!r}: expected "random"')
    if "backbone" in source:
        source["backbone"] = existing(folder, source["backbone"])
        if "/" in source["backbone"]:  # no network of timm has such a name
            _require_path(Path(source["backbone"]), f"{title}: backbone")
    return Arm(name=name, train=options, **source)  # type: ignore[arg-type]


def _task(name: str, table: Any, title: str, folder: Path, arms: Sequence[Arm]) -> Task:
    _require_safe(name, title)
    if name == TRAINING:
        raise ConfigError(f"{title}: the losses of the training have this name; use another one")
    values = dict(_table(table, title))
    chosen = _chosen(values.pop("arms", None), title, arms)
    seeds = values.pop("seeds", None)
    if seeds is not None and "seed" in values:
        raise ConfigError(f"{title}: expected either seed or seeds, got both")
    options = options_from(EvaluateOptions, values, title=title, folder=folder)
    spec = TASKS[options.task]
    for field in spec.needs:
        if not values.get(field):
            raise ConfigError(f"{title}: {field} missing; a {options.task} task needs it")
    if options.out is not None:
        raise ConfigError(f"{title}: out: expected none, as a sweep records results; leave it out")
    try:
        options.require_task(options.task)
        if spec.annotations is not None:
            options.require_annotations()
    except ConfigError as error:
        raise ConfigError(f"{title}: {error}") from error
    for field in spec.paths:
        path = getattr(options, field)
        if path is not None:
            _require_path(path, f"{title}: {field}")
    if options.head == RUN_HEAD:
        for arm in arms:
            if (chosen is None or arm.name in chosen) and (not arm.trains or not arm.train.labels):
                raise ConfigError(
                    f'{title}: head = "run": arm {arm.name} trains no head, as it has no labels; '
                    "list the arms that do in arms"
                )
    elif options.head not in ("linear", "fpn"):
        options = replace(options, head=str(folder / options.head))
    if options.teacher is not None:
        raise ConfigError(f"{title}: teacher: only the evaluation of a cache uses it; leave it out")
    return Task(
        name=name,
        arms=chosen,
        options=options,
        seeds=(options.seed,) if seeds is None else _seeds(seeds, f"{title}: seeds"),
    )


def _chosen(value: Any, title: str, arms: Sequence[Arm]) -> tuple[str, ...] | None:
    """Return the arms that a task lists, or None for all."""
    if value is None:
        return None
    names = [arm.name for arm in arms]
    items = value if isinstance(value, list) else [value]
    for item in items:
        if item not in names:
            raise ConfigError(f"{title}: arms: {item!r}: the arms are {', '.join(names)}")
    return tuple(items)


def _require_sources(path: Path, caches: Sequence[CacheEntry], arms: Sequence[Arm]) -> None:
    """Raise ConfigError for an unknown cache, or a random start without an arm to start."""
    if not arms:
        raise ConfigError(f"{path}: expected at least one [[arm]]")
    names = [cache.name for cache in caches]
    for arm in arms:
        for cache in arm.caches:
            if cache not in names:
                have = f"the caches are {', '.join(names)}" if names else "it has no [[cache]]"
                raise ConfigError(f"{path}: [[arm]] {arm.name}: cache {cache!r}: {have}")
        if arm.start is not None and not any(other.trains for other in arms):
            raise ConfigError(
                f"{path}: [[arm]] {arm.name}: start: expected an arm that trains too, whose views "
                "and input size a random start takes"
            )


def existing(folder: Path, text: str) -> str:
    """Return the path of a file or folder that exists below `folder`; else the text, an id."""
    return str(folder / text) if (folder / text).exists() else text


def _entries(table: Mapping[str, Any], key: str, path: Path) -> list[tuple[dict[str, Any], str]]:
    """Return the entries of an array of tables, each with its title."""
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path}: {key}: expected tables, each under [[{key}]]")
    return [(entry, f"{path}: [[{key}]]") for entry in entries]


def _unique(entries: Sequence[Named], title: str) -> tuple[Named, ...]:
    names: set[str] = set()
    for entry in entries:
        # Names are folders, and some file systems ignore case.
        if entry.name.lower() in names:
            raise ConfigError(f"{title} {entry.name}: named twice; each needs a name of its own")
        names.add(entry.name.lower())
    return tuple(entries)


def _name(table: Mapping[str, Any], title: str) -> str:
    if "name" not in table:
        raise ConfigError(f"{title}: name missing")
    name = table["name"]
    _require_safe(name, title)
    return str(name)


def _require_safe(name: Any, title: str) -> None:
    """Raise ConfigError for a name that is not the name of a folder on every file system."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(
            f"{title}: name {str(name)[:80]!r}: expected up to 64 letters, digits, dots, dashes "
            "and underscores, the first a letter or digit"
        )


def _require_path(path: Path, title: str) -> None:
    try:
        exists = path.exists()
    except OSError as error:
        raise ConfigError(f"{title}: {str(path)[:80]}...: {error.strerror}") from error
    if not exists:
        raise ConfigError(f"{title}: {path} does not exist; paths are relative to the sweep file")


def _seeds(value: Any, title: str) -> tuple[int, ...]:
    items = value if isinstance(value, list) else []
    if not items or any(isinstance(item, bool) or not isinstance(item, int) for item in items):
        raise ConfigError(f"{title}: expected a list of one or more integers, such as [0, 1, 2]")
    for item in items:
        if not 0 <= item <= MAX_SEED:
            raise ConfigError(f"{title}: {item}: expected a seed from 0 to {MAX_SEED}")
    if len(set(items)) < len(items):
        raise ConfigError(f"{title}: expected each seed once")
    return tuple(items)


def _table(value: Any, title: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{title}: expected a table, got {value!r}")
    return value


def _text(value: Any, title: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{title}: expected text, got {value!r}")
    return value


def _bool(value: Any, title: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{title}: expected true or false, got {value!r}")
    return value
