"""The plan of an extraction: images, teacher, and options with every default resolved."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dtcache.device import resolve_compute
from dtcache.errors import ConfigError
from dtcache.images import ImageSource
from dtcache.options import QUALITY_RATIOS, ExtractOptions
from dtcache.process_settings import cpu_threads
from dtcache.recipe import (
    MAX_SAMPLES,
    MAX_SHARD_ROWS,
    MAX_SHARDS,
    CodecSpec,
    Equivariance,
    Json,
    Recipe,
    ViewSpec,
    tap_name,
)
from dtcache.rng import permuted
from dtcache.samples import SampleList
from dtcache.store.sample_index import hash_samples
from dtcache.teacher import CallableTeacher, LoadedTeacher, Teacher, TeacherInput, load_teacher
from pipelines.extract.batch_size import fastest_batch
from pipelines.extract.begun_cache import (
    BegunCache,
    find_begun_cache,
    require_same_classes,
    require_same_recipe,
)
from pipelines.extract.check_options import check_options, check_target
from pipelines.extract.teacher_classes import require_teacher_classes
from pipelines.make_teacher import make_teacher, stored_prompt
from pipelines.terminal.open_images import open_images
from pipelines.terminal.output import say


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionPlan:
    """Everything that turns rows into shards, in whichever process they are computed."""

    source: ImageSource
    samples: SampleList
    """The rows of the cache, in order."""
    teacher: Teacher
    options: ExtractOptions
    """`batch_size` is a number; `threads` is a number on a CPU and None on a GPU; `shard_rows` is
    None only before the fit of a new cache, if the user left it out."""
    begun: BegunCache | None = None
    """The cache that is resumed, or None if a new one is begun."""

    @property
    def view(self) -> ViewSpec:
        """The geometry of a view."""
        return self.teacher.view

    @property
    def flips(self) -> tuple[bool, ...]:
        """Which mirrorings are cached: (False,) or (False, True)."""
        return (False, True) if self.options.flip else (False,)

    @property
    def num_views(self) -> int:
        """Views per row."""
        return len(self.flips) * (1 if self.options.average else self.options.draws)

    @property
    def names(self) -> list[str]:
        """The arrays of features, timestep by timestep, finest tap first."""
        spec = self.teacher.spec
        return [tap_name(t, tap.name) for t in spec.timesteps for tap in spec.taps]

    @property
    def values_per_view(self) -> int:
        """Numbers in the features of one view."""
        spec = self.teacher.spec
        return sum(tap.values for tap in spec.taps) * len(spec.timesteps)

    @property
    def fp16_bytes_per_image(self) -> int:
        """Bytes of the features of one image, stored as float16."""
        return 2 * self.num_views * self.values_per_view

    @property
    def ratio(self) -> float | None:
        """float16 bytes over stored bytes that the codec is fitted for; None stores float16."""
        if self.options.bytes_per_image is None:
            return QUALITY_RATIOS[self.options.quality]
        return self.fp16_bytes_per_image / self.options.bytes_per_image

    def input(
        self, pixels_CHW: NDArray[np.uint8], row: int, flip: bool, draws: Sequence[int]
    ) -> TeacherInput:
        """Return the teacher's input for a row's view, mirrored if `flip`, with these draws."""
        sample = self.samples[row]
        return self.teacher.input(
            pixels_CHW,
            sample.key,
            flip,
            seed=self.options.seed,
            draws=draws,
            label=sample.label,
        )

    def recipe(
        self,
        codec: CodecSpec,
        shard_rows: int,
        equivariance: Equivariance | None = None,
        round_trip: dict[str, float] | None = None,
    ) -> Recipe:
        """Return the recipe of the cache, from its fitted codec and its measurements."""
        options = self.options
        return Recipe(
            teacher=self.teacher.spec,
            view=self.view,
            codec=codec,
            samples_sha256=hash_samples(self.samples),
            num_samples=len(self.samples),
            flips=options.flip,
            draws=options.draws,
            average=options.average,
            seed=options.seed,
            shard_rows=shard_rows,
            threads=options.threads,
            store_images=options.store_images,
            equivariance=equivariance,
            round_trip=round_trip,
        )

    def fixed_recipe(self) -> Json:
        """Return the fields of the recipe that options and inputs determine before the fit."""
        ratio = self.ratio
        unfitted = CodecSpec(
            name="float16" if ratio is None else "pca-dct-rans",
            ratio=ratio,
            step=None,
            fit_rows=0,
            fit_sha256="",
            noise_share={},
            noise_floor={},
            determined_error={},
        )
        fixed = self.recipe(unfitted, self.options.shard_rows or 0).to_json()
        # The other fields of the codec are fitted; noise levels follow from the configuration.
        fixed["codec"] = {name: fixed["codec"][name] for name in ("name", "whitening", "ratio")}
        del fixed["teacher"]["alpha_bars"], fixed["teacher"]["snrs"]
        for name in ("ddim_steps", "compiled"):
            fixed["teacher"].setdefault(name, None)
        condition = fixed["teacher"].pop("condition", None)
        if condition is not None:
            causes = {
                name: condition[name] for name in ("kind", "number", "prompt") if name in condition
            }
            fixed["teacher"]["condition"] = causes | condition
        for name in ("shard_rows", "threads"):
            if getattr(self.options, name) is None:
                fixed.pop(name, None)
        # A comparison names the first difference, so causes come before effects: another seed also
        # changes the sample list, and other taps or views change the ratio of `bytes_per_image`.
        causes_first = ("seed", "flips", "draws", "average", "teacher")
        return {name: fixed[name] for name in causes_first} | fixed


def plan_extraction(
    images: Path, out: Path, options: ExtractOptions, teacher: CallableTeacher | None = None
) -> ExtractionPlan:
    """Check everything that can be checked before computing, and load images and teacher.

    `teacher` is a teacher made in Python; leave `options.teacher` empty with it. Writes nothing.
    Raises ConfigError, CacheMismatchError if `out` holds a different cache or files that dtcache
    did not create, and what loading images and teacher raises.
    """
    check_options(options, teacher)
    begun = find_begun_cache(out)
    plan = make_plan(open_images(images, options), options, teacher, begun)
    if begun is not None:
        require_same_recipe(begun, plan.fixed_recipe(), plan.samples)
        require_same_classes(begun, plan.source)
    return plan


def make_plan(
    source: ImageSource,
    options: ExtractOptions,
    teacher: CallableTeacher | None = None,
    begun: BegunCache | None = None,
) -> ExtractionPlan:
    """Load the teacher, resolve the options and order the samples.

    `check_options` has accepted the options. Options that are None take their value from the recipe
    of a begun cache. Raises ConfigError, TeacherError, and ImagesError if the teacher needs labels
    that the images do not have.
    """
    if teacher is not None:
        loaded = teacher.loaded()
    else:
        stored = stored_prompt(begun.root, begun.manifest) if begun is not None else None
        loaded = load_teacher(options.teacher, prompt=options.prompt, stored=stored)
    for line in (*(f"warning: {warning}" for warning in loaded.warnings), *loaded.notes):
        say(line)
    recipe = begun.manifest.recipe if begun is not None else None
    device_type = resolve_compute(options.device, options.precision).device.type
    batch_size = options.batch_size or (
        recipe["teacher"]["batch_size"] if recipe is not None else _fastest(loaded, options)
    )
    resolved = replace(
        options,
        batch_size=batch_size,
        threads=resolve_threads(options, device_type, recipe),
        shard_rows=options.shard_rows or (recipe["shard_rows"] if recipe is not None else None),
    )
    plan = plan_rows(source, make_teacher(loaded, resolved, batch_size), resolved, begun)
    check_target(resolved, plan.fp16_bytes_per_image)
    return plan


def plan_rows(
    source: ImageSource,
    teacher: Teacher,
    options: ExtractOptions,
    begun: BegunCache | None = None,
) -> ExtractionPlan:
    """Order the samples of `source` for a teacher; the options are resolved already.

    Raises ImagesError if the teacher needs labels that the images do not have, and ConfigError if
    the images are more than a cache can hold.
    """
    order = permuted(len(source.keys), seed=options.seed, stream="rows")[: options.limit]
    most = min(MAX_SAMPLES, MAX_SHARDS * (options.shard_rows or MAX_SHARD_ROWS))
    if len(order) > most:
        raise ConfigError(
            f"{len(order)} images: expected at most {most}; pass `limit`, or a larger `shard_rows`"
        )
    labels = source.labels
    samples = SampleList(source.keys, labels, order)
    teacher.require_labels(
        (s.key for s in samples), (s.label for s in samples) if labels is not None else None
    )
    require_teacher_classes(teacher, source)
    return ExtractionPlan(
        source=source, samples=samples, teacher=teacher, options=options, begun=begun
    )


def resolve_threads(options: ExtractOptions, device_type: str, begun: Json | None) -> int | None:
    """Return the CPU threads of each process that computes; None on a GPU.

    The number is a constant of the recipe. `begun` is the recipe of a begun cache; its number is
    used if the options have none.
    """
    if device_type != "cpu":
        return None
    if begun is not None:
        return options.threads or begun.get("threads")
    return _computing_threads(options)


def _computing_threads(options: ExtractOptions) -> int:
    """Return `threads`, or else this process's threads, shared by `workers`; 1 with a scheduler."""
    if options.threads:
        return options.threads
    return 1 if options.scheduler else max(1, torch.get_num_threads() // (options.workers or 1))


def _fastest(loaded: LoadedTeacher, options: ExtractOptions) -> int:
    # Compiling for each size would take minutes, and would change the later compilation.
    eager = replace(options, compile=False)
    with cpu_threads(_computing_threads(options)):
        return fastest_batch(lambda size: make_teacher(loaded, eager, size))
