"""What an extraction computes: samples, view, teacher and noise; it knows no shard, no scheduler and no store."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtcache.columns import SampleList
from dtcache.device import resolve_compute
from dtcache.errors import ConfigError
from dtcache.images import ImageSource, LoadedView, permuted
from dtcache.options import ExtractOptions, parse_ints, parse_size
from dtcache.spec import MAX_SHARD_ROWS, MAX_SIDE, MAX_VIEWS, ViewSpec
from dtcache.store.layout import tap_name
from dtcache.teacher import Teacher, load_teacher, native_size, noise_batch, prepare_teacher


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
        return [tap_name(t, tap.name) for t in self.teacher.spec.timesteps for tap in self.teacher.spec.taps]

    def raw_features(
        self, loaded: list[LoadedView], rows: list[int], flips: list[bool], draw: int
    ) -> dict[str, Tensor]:
        """Return raw features by array name for one view a row; the lists run together."""
        pixels_BCHW = torch.stack(
            [torch.from_numpy(v.pixels_CHW).flip(2) if f else torch.from_numpy(v.pixels_CHW)
             for v, f in zip(loaded, flips, strict=True)]
        )  # fmt: skip
        keys = [self.samples[row].key for row in rows]
        found = {}
        for t in self.teacher.spec.timesteps:
            noise_BCHW = noise_batch(keys, flips, self.view, seed=self.seed, timestep=t, draw=draw)
            features = self.teacher.features(pixels_BCHW, noise_BCHW, t)
            found.update({tap_name(t, tap): raw_BCHW for tap, raw_BCHW in features.items()})
        return found


def make_job(source: ImageSource, options: ExtractOptions) -> Job:
    """Load the teacher and order the samples. Raises ConfigError, TeacherError."""
    if options.average and options.draws < 2:
        raise ConfigError(f"--average: expected at least 2 --draws to take the mean of, got {options.draws}")
    if options.flip and options.batch_size < 2:
        raise ConfigError(f"--batch-size {options.batch_size}: expected at least 2, both flips of an image")
    views = options.draws * (2 if options.flip else 1)
    if max(options.draws, 1 if options.average else views) > MAX_VIEWS:
        raise ConfigError(f"--draws {options.draws}: expected at most {MAX_VIEWS} draws, and as many views an image")
    if options.shard_rows is not None and options.shard_rows > MAX_SHARD_ROWS:
        raise ConfigError(f"--shard-rows {options.shard_rows}: expected at most {MAX_SHARD_ROWS}")
    loaded = load_teacher(options.teacher)
    height, width = parse_size(options.size) if options.size else native_size(loaded)
    if max(height, width) > MAX_SIDE:
        raise ConfigError(f"--size {height}x{width}: expected at most {MAX_SIDE} pixels a side")
    view = ViewSpec(height=height, width=width, fit="stretch" if options.fit == "stretch" else "crop")
    teacher = prepare_teacher(
        loaded,
        view,
        strides=parse_ints(options.taps, "--taps") if options.taps else None,
        timesteps=options.timestep,
        batch_size=options.batch_size,
        compute=resolve_compute(options.device, options.precision),
    )
    order = permuted(len(source.keys), seed=options.seed, stream="rows")[: options.limit]
    return Job(
        source=source,
        samples=SampleList(source.keys, source.labels, order),
        view=view,
        teacher=teacher,
        flips=(False, True) if options.flip else (False,),
        draws=options.draws,
        average=options.average,
        stores_images=options.images == "view",
        seed=options.seed,
    )
