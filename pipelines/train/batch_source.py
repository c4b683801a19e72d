"""The training data of a student: the protocol of a cache and of a teacher in the loop."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from dtcache.cache.batch import Rows, TrainBatch
from dtcache.cache.label_set import LabelSet
from dtcache.cache.loader import Batching
from dtcache.distributed import Processes
from dtcache.labels.label_decoder import LabelDecoder
from dtcache.losses.teachers import TeacherTargets
from dtcache.options import TrainOptions
from dtcache.recipe import Json, ViewSpec
from pipelines.train.distillation import DecodedBatch


class BatchSource(Protocol):
    """Batches of images with their targets."""

    teachers: tuple[TeacherTargets, ...]
    """The teachers whose arrays are regressed, one or more."""
    view: ViewSpec
    labels: LabelSet | None
    """The soft labels that are distilled beside the features, if any."""
    label_decoder: LabelDecoder | None
    """Turns soft labels into logits, on the device; None without `labels`."""
    identity: Json
    """The fields that identify the data of a run, beside its options."""

    @property
    def names(self) -> list[str]:
        """The arrays: teacher by teacher, timestep by timestep, the finest tap first."""

    @property
    def num_batches(self) -> int:
        """Global batches per epoch."""

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of an array's maps."""

    def epoch(self, epoch: int, start: int) -> Iterator[Any]:
        """Yield this process's micro-batches of an epoch, from global batch `start` on."""

    def held_out(self) -> Iterator[Any]:
        """Yield batches of the held-out samples: the same views and noise in every call."""

    def ready(self, batch: Any) -> TrainBatch:
        """Return a batch of this source on the device, as students and decoders take it."""

    def decode(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Return a batch's whitened targets by array, fp32 (B, C, H, W), on the device."""

    def keys(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return the keys of samples."""


def decoded(source: BatchSource, batch: Any) -> DecodedBatch:
    """Return a batch of a source with its targets, on the device."""
    return DecodedBatch(source.ready(batch), source.decode, source.label_decoder)


def batching(options: TrainOptions, processes: Processes) -> Batching:
    """Return how the options and this process divide the samples of an epoch into batches."""
    return Batching(
        batch_size=options.batch_size,
        seed=options.seed,
        threads=options.num_workers,
        shuffle=options.shuffle or "full",
        rank=processes.rank,
        world_size=processes.world_size,
        micro_batches=options.micro_batches,
    )
