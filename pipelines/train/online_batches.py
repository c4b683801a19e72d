"""Training batches from a teacher in the loop: the paper's own method, the baseline for caches.

Only the source of a batch differs from training on a cache. Rows, split, order, flips and the noise
of epoch 0 are those of a cache with the same seed; each later epoch has fresh noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtcache.cache.batch import Rows, TrainBatch
from dtcache.cache.label_set import LabelSet
from dtcache.cache.loader import EpochLoader
from dtcache.cache.selection import split_rows
from dtcache.device import Compute
from dtcache.distributed import Processes
from dtcache.errors import BadImageError, ConfigError, ImagesError
from dtcache.images.decode import decode_view
from dtcache.labels.label_decoder import LabelDecoder
from dtcache.losses.teachers import TeacherTargets
from dtcache.options import ExtractOptions, TrainOptions
from dtcache.recipe import Json, tap_name
from dtcache.row_set import RowSet
from dtcache.store.sample_index import hash_samples
from dtcache.teacher import TeacherBatch
from dtcache.whitening import whiten
from pipelines.extract.check_options import check_options
from pipelines.extract.plan import ExtractionPlan, make_plan
from pipelines.terminal.open_images import open_images
from pipelines.train.batch_source import batching


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineBatch:
    """B views on the host, before the teacher's pass."""

    rows: Rows
    """(B,): positions in the permuted order of the images."""
    inputs: TeacherBatch
    """Pixels, mirrored if the view is, with one draw of noise."""


class _Drawn:
    """Images with the noise of one draw. The threads of the loader share this object."""

    num_views = 2  # original and mirrored
    shard_rows = None

    def __init__(self, images: Path, plan: ExtractionPlan, draw: int) -> None:
        self._images = images
        self._plan = plan
        self._draw = draw

    def will_need(self, rows: Rows, names: Sequence[str]) -> None:
        """Do nothing: images have no shards."""

    def batch(self, rows: Rows, views: Rows, names: Sequence[str]) -> OnlineBatch:
        """Read and prepare B views. Raises ImagesError if an image cannot be read."""
        plan = self._plan
        inputs = []
        for row, view in zip(rows.tolist(), views.tolist(), strict=True):
            sample = plan.samples[row]
            try:
                pixels_CHW, _ = decode_view(plan.source.read(sample.index), plan.view)
            except (OSError, BadImageError) as error:
                raise ImagesError(
                    f"{self._images}: {sample.key}: {error}; remove it, or train from a cache, "
                    "which leaves it out"
                ) from error
            draws = [self._draw]
            inputs.append(
                plan.teacher.input(
                    pixels_CHW,
                    sample.key,
                    view == 1,
                    seed=plan.options.seed,
                    draws=draws,
                    label=sample.label,
                )
            )
        return OnlineBatch(rows=rows, inputs=plan.teacher.batch(inputs))


class OnlineSource:
    """A BatchSource over images; a teacher computes the targets of each batch."""

    def __init__(
        self, images: Path, options: TrainOptions, compute: Compute, processes: Processes
    ) -> None:
        """Load the teacher and list the images. Raises ConfigError, TeacherError or ImagesError."""
        self._images = images
        self._options = options
        self._processes = processes
        extraction = _teacher_options(options, compute, processes)
        check_options(extraction, None)
        self._plan = make_plan(open_images(images, options, shown=processes.rank == 0), extraction)
        spec = self._plan.teacher.spec
        self.view = self._plan.view
        self._shapes = {
            tap_name(t, tap.name): (tap.channels, tap.height, tap.width)
            for t in spec.timesteps
            for tap in spec.taps
        }
        self.teachers: tuple[TeacherTargets, ...] = (TeacherTargets(names=tuple(self._plan.names)),)
        samples = self._plan.samples
        rows = RowSet([0], [len(samples)])
        self._rows, self._held = split_rows(rows, self.keys(rows))
        self.num_batches = self._drawn(0).num_batches
        self.labels: LabelSet | None = None
        self.label_decoder: LabelDecoder | None = None
        self.identity: Json = {
            "teacher_weights_sha256": spec.weights_sha256,
            "teacher_config_sha256": spec.config_sha256,
            "samples": hash_samples(samples),
        }

    def _drawn(self, draw: int) -> EpochLoader[OnlineBatch]:
        options = self._options
        return EpochLoader(
            _Drawn(self._images, self._plan, draw),
            self._rows,
            self.names,
            batching(options, self._processes),
        )

    @property
    def names(self) -> list[str]:
        """The arrays that are regressed: timestep by timestep, the finest tap first."""
        return self._plan.names

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of an array's maps."""
        return self._shapes[name]

    def epoch(self, epoch: int, start: int) -> Iterator[OnlineBatch]:
        """Yield this process's micro-batches, with the noise of draw number `epoch`.

        The noise is a function of (seed, key, timestep, epoch, flip).
        """
        return self._drawn(epoch).epoch(epoch, start)

    def held_out(self) -> Iterator[OnlineBatch]:
        """Yield the held-out samples, not mirrored, with the noise of draw 0."""
        drawn = _Drawn(self._images, self._plan, 0)
        size = self._plan.teacher.spec.batch_size
        for start in range(0, len(self._held), size):
            rows = self._held[start : start + size].array()
            yield drawn.batch(rows, np.zeros_like(rows), self.names)

    def ready(self, batch: OnlineBatch) -> TrainBatch:
        """Run the teacher and return its whitened features, uncompressed."""
        coefficients = {}
        scalars = {}
        for name, raw_BCHW in next(iter(self._plan.teacher.features(batch.inputs))).items():
            whitened_BCHW, mu_B, sigma_B = whiten(raw_BCHW)
            coefficients[name], scalars[name] = whitened_BCHW, torch.stack([sigma_B, mu_B], 1)
        images_BCHW = batch.inputs.pixels_BCHW.to(self._plan.teacher.device, non_blocking=True)
        return TrainBatch(
            rows=batch.rows, images_BCHW=images_BCHW, coefficients=coefficients, scalars=scalars
        )

    def decode(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Return a batch's whitened features, which `ready` has computed."""
        return batch.coefficients

    def keys(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return the keys of samples."""
        return [self._plan.samples[int(row)].key for row in rows]


def _teacher_options(
    options: TrainOptions, compute: Compute, processes: Processes
) -> ExtractOptions:
    """Return the options of the extraction that would compute the same features."""
    if options.teacher is None:
        raise ConfigError("`teacher`: expected the teacher to run in the loop; pass it")
    return ExtractOptions(
        teacher=options.teacher,
        prompt=options.prompt,
        condition=options.condition,
        size=options.size,
        resize_mode=options.resize_mode or "crop",
        taps=options.taps,
        timestep=None if options.timestep is None else (options.timestep,),
        encoding=options.encoding or "ddpm",
        ddim_steps=options.ddim_steps,
        seed=options.seed,
        limit=options.limit,
        batch_size=max(2, options.batch_size // (processes.world_size * options.micro_batches)),
        device=str(compute.device),
        # fp16 is for the student alone, whose loss is scaled; its narrow range could overflow in
        # the teacher.
        precision=compute.precision if compute.precision != "fp16" else "auto",
        compile=options.compile,
    )
