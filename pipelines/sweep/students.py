"""The students of a sweep: trained ones, random starts, and backbones made elsewhere.

Each makes an ordinary run folder. Importing this module loads no torch.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Protocol

from dtcache.atomic_files import FolderLock, make_folders, write_file
from dtcache.errors import CacheError, TrainingError
from dtcache.hashing import file_sha256
from dtcache.options import TrainOptions
from dtcache.options.toml import config_text
from dtcache.options.train import PER_STUDENT, SEVERAL_PER_PROCESS, VOLATILE
from dtcache.recipe import Json
from dtcache.store.remote import Location
from pipelines.runs.folder import BACKBONE, CONFIG, METRICS, claim_run

WEIGHTS = "model.safetensors"
TIMED_STEPS = 3
"""Steps that an estimate of a training takes."""
NO_STEP = {"step": 0, "loss": None, "seconds": 0.0, "images_per_second": 0.0, "wait_share": 0.0}
"""Metrics of the last step of a student that took none."""


class Student(Protocol):
    """How a student is made."""

    def identity(self) -> Json:
        """Return everything that the student depends on, by field."""

    def loading(self) -> "Loading | None":
        """Return what the student trains on; None if it cannot share a loader."""

    def seconds(self) -> float | None:
        """Return about how long it takes to make the student; None if that is not known."""

    def make(self, out: Path) -> None:
        """Make the student's run folder, or resume it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """The data and the options of a training."""

    where: tuple[Location, ...]
    options: TrainOptions

    @property
    def batches(self) -> tuple[object, ...]:
        """Everything that decides its batches; students of equal ones can share a loader."""
        values = [v for name, v in asdict(self.options).items() if name not in PER_STUDENT]
        # Without a feature loss a batch has no features.
        return (self.where, self.options.feature_weight == 0, *values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Training data: one or several caches, or images with a teacher in the loop."""

    where: tuple[Location, ...]
    identity: Json
    """The hashes of sealed caches; the names of caches that the sweep makes; or the images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedStudent:
    """A student that is trained."""

    source: Source
    options: TrainOptions

    def identity(self) -> Json:
        """Return the options that must not change on resume, and the identity of the data."""
        return {**lasting(self.options), **self.source.identity}

    def loading(self) -> "Loading | None":
        """Return data and options, or None if the tracker logs one run per process."""
        if self.options.log_with not in SEVERAL_PER_PROCESS:
            return None
        return Loading(where=self.source.where, options=self.options)

    def seconds(self) -> float | None:
        """Return the time of all training steps, from a few that are taken and timed.

        None if the data is not there yet or the loss is not finite. Nothing is written. Raises
        ConfigError if the student cannot be built.
        """
        from dtcache.device import resolve_compute
        from dtcache.distributed import Processes
        from dtcache.process_settings import configure_process
        from pipelines.train.train import open_source
        from pipelines.train.trainer import Trainer, accumulate

        if not all(path.exists() for path in self.source.where if isinstance(path, Path)):
            return None
        compute = resolve_compute(self.options.device, self.options.precision)
        configure_process(compute.device)
        ends: list[float] = []
        try:
            source = open_source(self.source.where, self.options, compute, Processes())
            trainer = Trainer(source, self.options, compute, Processes())
            micro_batches = source.epoch(0, 0)
            while len(ends) < 1 + TIMED_STEPS:
                batches = list(islice(micro_batches, self.options.micro_batches))
                if not batches:
                    break
                accumulate(source, [trainer], batches)
                trainer.update(batches)
                ends.append(time.monotonic())
        except (CacheError, TrainingError):
            # The sweep has not finished making the cache, or the loss is not finite.
            return None
        # The first step allocates memory.
        steps = [after - before for before, after in pairwise(ends)]
        return statistics.median(steps) * trainer.total_steps if steps else None

    def make(self, out: Path) -> None:
        """Train the student. Raises what `train` raises."""
        from pipelines.train.train import train

        train(self.source.where, out, self.options)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomStart:
    """The student that trained ones of the same options and seed start from, not trained."""

    source: Source
    """Data of a student that trains: its view, input size and held-out samples are used."""
    options: TrainOptions

    def identity(self) -> Json:
        """Return the identity of the trained student, and that this one is not trained."""
        return {"start": "random", **lasting(self.options), **self.source.identity}

    def loading(self) -> None:
        """Return None: the student is not trained."""

    def seconds(self) -> None:
        """Return None: no step of it can be timed."""

    def make(self, out: Path) -> None:
        """Write a run of no steps: backbone, options and held-out losses."""
        from dtcache.device import resolve_compute
        from dtcache.distributed import Processes
        from dtcache.process_settings import configure_process
        from pipelines.train.student_run import exported_losses, save_student, write_summary
        from pipelines.train.train import open_source
        from pipelines.train.trainer import Trainer, evaluate

        compute = resolve_compute(self.options.device, self.options.precision)
        configure_process(compute.device)
        processes = Processes()
        source = open_source(self.source.where, self.options, compute, processes)
        trainer = Trainer(source, self.options, compute, processes)
        with FolderLock(out):
            values = {**asdict(self.options), "precision": compute.precision}
            claim_run(out, {**values, **source.identity, "start": "random"}, VOLATILE)
            write_file(out / CONFIG, config_text(values).encode())
            (losses,) = evaluate(source, [trainer])
            save_student(trainer.exported, out / BACKBONE, source.view)
            write_file(out / METRICS, f"{json.dumps({'step': 0, 'epoch': 0, **losses})}\n".encode())
            held_out = exported_losses(losses, self.options)
            write_summary(out, self.options, source, NO_STEP, held_out)


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherBackbone:
    """A backbone that the sweep does not train: a folder, or a timm name with timm's weights."""

    backbone: str
    options: TrainOptions
    """Of a timm name, the input size is that of a student with these options."""
    source: Source | None
    """Data of a student that trains, if an arm does: a timm name takes its view."""

    def identity(self) -> Json:
        """Return the hash of the weights, or the timm name."""
        folder = self.folder
        if folder is not None:
            return {"backbone": file_sha256(folder / WEIGHTS)}
        return {"backbone": self.backbone, "student_size": self.options.student_size}

    def loading(self) -> None:
        """Return None: the student is not trained."""

    def seconds(self) -> None:
        """Return None: no step of it can be timed."""

    def make(self, out: Path) -> None:
        """Copy the backbone into a run folder. Raises what `load_backbone` raises."""
        from dtcache.student import load_backbone

        folder = self.folder
        with FolderLock(out):
            if folder is None:
                self._save_pretrained(out)
                return
            backbone, _, _ = load_backbone(folder)
            claim_run(out, {"student": backbone.name, **self.identity()}, ())
            make_folders(out / BACKBONE)
            for name in ("config.json", WEIGHTS):
                write_file(out / BACKBONE / name, (folder / name).read_bytes())

    @property
    def folder(self) -> Path | None:
        """The backbone's folder, which may be in a run, or None for a timm name."""
        folders = (Path(self.backbone), Path(self.backbone) / BACKBONE)
        return next((folder for folder in folders if (folder / WEIGHTS).is_file()), None)

    def _save_pretrained(self, out: Path) -> None:
        from dtcache.device import resolve_compute
        from dtcache.distributed import Processes
        from dtcache.options import parse_size
        from dtcache.recipe import ViewSpec
        from dtcache.student import make_backbone, save_backbone
        from dtcache.student.student import default_size
        from pipelines.train.train import open_source

        text = self.options.student_size
        size = parse_size(text, "student_size") if text else None
        view = None
        if self.source is not None:
            compute = resolve_compute(self.options.device, self.options.precision)
            data = open_source(self.source.where, self.options, compute, Processes())
            view = data.view
            size = size or default_size({name: data.shape(name) for name in data.names}, view)
        backbone = make_backbone(self.backbone, init="pretrained", seed=0, size=size)
        size = size or backbone.default_size
        backbone.require_size(size)
        view = view or ViewSpec(height=size[0], width=size[1])
        claim_run(out, {"student": self.backbone, **self.identity()}, ())
        save_backbone(backbone, out / BACKBONE, input_size=size, view=view)


def lasting(options: TrainOptions) -> Json:
    """Return the options that must not change when a run is resumed."""
    return {name: value for name, value in asdict(options).items() if name not in VOLATILE}
