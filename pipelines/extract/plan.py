"""What an extraction computes: samples, view, teacher and noise; it knows no shard, no scheduler and no store."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dtcache.device import configure_process, cpu_threads, resolve_compute
from dtcache.errors import ConfigError
from dtcache.images import ImageSource, LoadedView
from dtcache.options import ExtractOptions, parse_size, parse_taps
from dtcache.recipe import (
    MAX_SAMPLES,
    MAX_SHARD_ROWS,
    MAX_SHARDS,
    MAX_SIDE,
    MAX_VIEWS,
    ViewSpec,
    tap_name,
)
from dtcache.rng import permuted
from dtcache.samples import SampleList
from dtcache.teacher import (
    CallableTeacher,
    LoadedTeacher,
    Prompt,
    Teacher,
    TeacherInput,
    TeacherSettings,
    load_teacher,
    native_size,
    prepare_teacher,
)
from pipelines.extract.batch_size import fastest_batch

DDIM_STEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything that turns rows into shards; it knows no scheduler and no writer."""

    source: ImageSource
    samples: SampleList
    view: ViewSpec
    teacher: Teacher
    flips: tuple[bool, ...]
    """Which mirrorings are cached: (False,) or (False, True)."""
    draws: int
    average: bool
    """Whether the draws become one view, their mean."""
    stores_images: bool
    seed: int

    @property
    def views(self) -> int:
        """Views of a row."""
        return len(self.flips) * (1 if self.average else self.draws)

    @property
    def names(self) -> list[str]:
        """The arrays of features, timestep by timestep, finest tap first."""
        return [
            tap_name(t, tap.name)
            for t in self.teacher.spec.timesteps
            for tap in self.teacher.spec.taps
        ]

    def input(self, loaded: LoadedView, row: int, flip: bool, draws: Sequence[int]) -> TeacherInput:
        """Return what the teacher needs of a row's image, mirrored or not, and several draws."""
        assert loaded.pixels_CHW is not None, "a failed image has no view"
        key = self.samples[row].key
        label = self.samples[row].label
        return self.teacher.input(
            loaded.pixels_CHW, key, flip, seed=self.seed, draws=draws, label=label
        )


def make_job(
    source: ImageSource,
    options: ExtractOptions,
    teacher: CallableTeacher | None = None,
    stored: Prompt | None = None,
) -> Job:
    """Load the teacher, unless one is given, and order the samples.

    `stored` is the prompt's embedding of a cache that was begun. Raises ConfigError, TeacherError, and ImagesError
    where the teacher is told labels that the images do not have.
    """
    if (teacher is None) != bool(options.teacher):
        got = "both" if options.teacher else "neither"
        raise ConfigError(
            f"--teacher: expected the name of a teacher or, from Python, a CallableTeacher, got {got}"
        )
    if teacher is not None and options.prompt is not None:
        raise ConfigError("--prompt: a CallableTeacher reads no text; leave --prompt out")
    _check_encoding(options, teacher is None or teacher.is_random)
    if options.average and options.draws < 2:
        raise ConfigError(
            f"--average: expected at least 2 --draws to take the mean of, got {options.draws}"
        )
    if options.flip and options.batch_size is not None and options.batch_size < 2:
        raise ConfigError(
            f"--batch-size {options.batch_size}: expected at least 2, both flips of an image"
        )
    views = options.draws * (2 if options.flip else 1)
    if max(options.draws, 1 if options.average else views) > MAX_VIEWS:
        raise ConfigError(
            f"--draws {options.draws}: expected at most {MAX_VIEWS} draws, and as many views an image"
        )
    if options.shard_rows is not None and options.shard_rows > MAX_SHARD_ROWS:
        raise ConfigError(f"--shard-rows {options.shard_rows}: expected at most {MAX_SHARD_ROWS}")
    if teacher is None:
        loaded = load_teacher(options.teacher, prompt=options.prompt, stored=stored)
    else:
        loaded = teacher.loaded()
    if loaded.latents is not None and loaded.latents.scale_warning is not None:
        print(f"warning: {loaded.latents.scale_warning}", file=sys.stderr)
    if options.batch_size is None:
        # Compiling each size would take minutes, and change what is compiled later.
        eager = replace(options, compile=False)
        with cpu_threads(computing_threads(options)):
            size = fastest_batch(lambda size: make_teacher(loaded, eager, size))
        options = replace(options, batch_size=size)
    return job_with(source, make_teacher(loaded, options), options)


def job_with(source: ImageSource, teacher: Teacher, options: ExtractOptions) -> Job:
    """Order the samples for a teacher.

    Raises ImagesError where it is told labels that the images do not have, ConfigError for more than a cache holds.
    """
    order = permuted(len(source.keys), seed=options.seed, stream="rows")[: options.limit]
    most = min(MAX_SAMPLES, MAX_SHARDS * (options.shard_rows or MAX_SHARD_ROWS))
    if len(order) > most:
        raise ConfigError(
            f"{len(order)} images: expected at most {most}; give --limit, or a larger --shard-rows"
        )
    labels = source.labels
    samples = SampleList(source.keys, labels, order)
    teacher.require_labels(
        (s.key for s in samples), (s.label for s in samples) if labels is not None else None
    )
    return Job(
        source=source,
        samples=samples,
        view=teacher.view,
        teacher=teacher,
        flips=(False, True) if options.flip else (False,),
        draws=options.draws,
        average=options.average,
        stores_images=options.images == "view",
        seed=options.seed,
    )


def _check_encoding(options: ExtractOptions, takes_noise: bool) -> None:
    """Raise ConfigError for draws where there is no noise to draw, and for steps of an inversion not asked for."""
    if options.encoding != "ddim" and options.ddim_steps is not None:
        raise ConfigError(
            f"--ddim-steps {options.ddim_steps}: expected --encoding ddim beside it; give both or none"
        )
    if (options.draws > 1 or options.average) and not (takes_noise and options.encoding == "ddpm"):
        what = (
            "--encoding ddim" if options.encoding == "ddim" else "a CallableTeacher without prepare"
        )
        raise ConfigError(
            f"{what} draws no noise: expected --draws 1 and no --average, got --draws {options.draws}"
        )


def computing_threads(options: ExtractOptions) -> int:
    """Return the CPU threads of each process that computes, where the recipe does not say it: --threads, or a share."""
    return options.threads or (
        1 if options.scheduler else max(1, torch.get_num_threads() // (options.workers or 1))
    )


def make_teacher(
    loaded: LoadedTeacher, options: ExtractOptions, batch_size: int | None = None
) -> Teacher:
    """Return a loaded teacher with the constants of the options; `batch_size`, if given, replaces theirs.

    Configures this process for the device. Raises ConfigError.
    """
    size = batch_size or options.batch_size
    assert size is not None, "auto is resolved by whoever asks for a teacher"
    height, width = parse_size(options.size) if options.size else native_size(loaded)
    if max(height, width) > MAX_SIDE:
        raise ConfigError(f"--size {height}x{width}: expected at most {MAX_SIDE} pixels a side")
    compute = resolve_compute(options.device, options.precision)
    configure_process(compute.device)
    return prepare_teacher(
        loaded,
        TeacherSettings(
            view=ViewSpec(
                height=height, width=width, fit="stretch" if options.fit == "stretch" else "crop"
            ),
            taps=parse_taps(options.taps) if options.taps else None,
            timesteps=options.timestep,
            batch_size=size,
            condition=options.condition,
            ddim_steps=(options.ddim_steps or DDIM_STEPS) if options.encoding == "ddim" else None,
            compile=options.compile,
        ),
        compute,
    )
