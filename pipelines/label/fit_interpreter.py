"""`dtcache label fit`: an interpreter of a cache's features, trained on its few labelled images.

N images of H x W pixels, B images per batch.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.atomic_files import whole_folder, write_file
from dtcache.cache.batch import Rows
from dtcache.cache.cache import Cache
from dtcache.cache.selection import chosen_taps
from dtcache.class_names import absent_warning
from dtcache.device import Compute, resolve_compute
from dtcache.device_memory import memory_errors
from dtcache.errors import ConfigError, ImagesError, TrainingError
from dtcache.labels import (
    FeatureInterpreter,
    InterpreterSpec,
    require_width,
    save_interpreter,
    teacher_identity,
)
from dtcache.losses.labels import cross_entropy, interpreter_loss
from dtcache.metrics.segmentation import Counts, confusion_matrix
from dtcache.optim import Optimization, OptimizationSpec
from dtcache.options import LabelFitOptions
from dtcache.process_settings import configure_process
from dtcache.recipe import Json
from dtcache.rng import permuted
from dtcache.store.remote import Location
from dtcache.student.blocks import resize
from pipelines.label.label_quality import label_scores
from pipelines.label.labelled_rows import LabelledRows, images_with_masks, labelled_images
from pipelines.label.prediction_grid import label_picture
from pipelines.runs.folder import METRICS
from pipelines.terminal.output import say
from pipelines.terminal.progress import track

PICTURE = "predictions.png"
SHOWN = 8
"""Most images in `predictions.png`."""
AT_ONCE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedInterpreter:
    """A finished fit."""

    out: Path
    trained_on: int
    """Number of labelled images that it was trained on."""
    validation: Json | None
    """`label_scores` on the held-out images; None without held-out images."""


def fit_interpreter(root: Location, out: Path, options: LabelFitOptions) -> FittedInterpreter:
    """Train an interpreter on a cache's features and write it to the folder `out`.

    The folder appears when the fit is finished. Raises ConfigError for options that cannot work,
    ImagesError for unusable masks or labels, TrainingError if the loss is not finite, and what
    opening a cache raises.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"`out` {out}: expected a new or empty folder, got one with files")
    _require_possible(options)
    cache = Cache(root)
    compute = resolve_compute(options.device, "fp32")
    configure_process(compute.device)
    if options.images is not None and not cache.has_images:
        cache = Cache(root, options.images, reading=options.reading)
    names = chosen_taps(cache, timestep=options.timestep, taps=options.taps)
    train, held_out = _split(_labelled(cache, options), options)
    unit = "image" if options.level == "image" else "pixel"
    trained_on = f"{unit} among the {len(train)} images trained on"
    if warning := absent_warning(train.classes, train.values, train.ignore, trained_on):
        say(warning)
    spec = InterpreterSpec(
        level="image" if options.level == "image" else "pixel",
        classes=train.classes,
        width=options.width,
        shapes={name: cache.shape(name) for name in names},
        view=cache.view,
        teacher=teacher_identity(cache.reader.manifest.recipe),
        validation=None,
    )
    torch.manual_seed(options.seed)
    training = _Training(cache, spec, compute)
    metrics = training.run(train, held_out, options)
    scores = training.scores(held_out) if len(held_out) else None
    spec = replace(spec, validation=scores)
    with whole_folder(out) as folder:
        save_interpreter(training.network, spec, folder)
        write_file(folder / METRICS, "".join(f"{json.dumps(line)}\n" for line in metrics).encode())
        if spec.level == "pixel":
            candidates = held_out if len(held_out) else train
            shown = candidates.take(range(min(SHOWN, len(candidates))))
            write_file(folder / PICTURE, training.picture(shown))
    return FittedInterpreter(out=out, trained_on=len(train), validation=scores)


def _require_possible(options: LabelFitOptions) -> None:
    """Raise ConfigError for options that cannot work, whatever the cache holds."""
    if options.warmup_epochs >= options.epochs:
        raise ConfigError(
            f"`warmup_epochs` {options.warmup_epochs}: expected fewer than the {options.epochs} "
            "`epochs`"
        )
    require_width(options.width)
    if options.validation >= 1:
        raise ConfigError(
            f"`validation` {options.validation:g}: expected a share under 1, such as 0.2, or 0 for "
            "none"
        )
    if options.level == "pixel":
        _masks(options)
    elif (options.masks, options.ignore_index, options.images) != (None, None, None):
        raise ConfigError(
            "`level='image'`: reads the cache's own labels; leave `masks`, `ignore_index` and "
            "`images` out"
        )


def _masks(options: LabelFitOptions) -> Path:
    if options.masks is None:
        raise ConfigError(
            "`masks`: expected the folder of the masks; or pass `level='image'` for image labels"
        )
    return options.masks


def _labelled(cache: Cache, options: LabelFitOptions) -> LabelledRows:
    root = cache.reader.root
    if options.level == "image":
        labelled = labelled_images(cache, options.limit)
        if len(labelled.values) < 2:
            raise ImagesError(
                f"{root}: expected labels of at least two classes, got {labelled.values[0]} alone; "
                "label other images"
            )
        return labelled
    return images_with_masks(
        cache,
        _masks(options),
        options.ignore_index,
        options.limit,
        options.images,
        options.reading,
    )


def _split(labelled: LabelledRows, options: LabelFitOptions) -> tuple[LabelledRows, LabelledRows]:
    """Return the images to train on and the held-out images.

    The split is a pure function of the number of images, the share and the seed.
    """
    count = max(1, round(options.validation * len(labelled))) if options.validation else 0
    if count >= len(labelled):
        raise ConfigError(
            f"expected at least 2 labelled images, one of them held out, got {len(labelled)}; "
            "label more images, or pass `validation=0`"
        )
    order = permuted(len(labelled), seed=options.seed, stream="label-validation").tolist()
    return labelled.take(sorted(order[count:])), labelled.take(sorted(order[:count]))


class _Training:
    """An interpreter in training, on its device, and the cache whose features it reads."""

    def __init__(self, cache: Cache, spec: InterpreterSpec, compute: Compute) -> None:
        self._cache = cache
        self._spec = spec
        self._compute = compute
        self._decoder = cache.decoder(list(spec.shapes)).to(compute.device)
        self.network: FeatureInterpreter = spec.build().to(compute.device)

    def run(
        self, train: LabelledRows, held_out: LabelledRows, options: LabelFitOptions
    ) -> list[Json]:
        """Train for all epochs and return one line of metrics per epoch."""
        steps = -(-len(train) // options.batch_size)
        total = options.epochs * steps
        optimization = Optimization(
            self.network,
            OptimizationSpec(
                lr=options.lr,
                weight_decay=options.weight_decay,
                warmup_steps=options.warmup_epochs * steps,
                total_steps=total,
            ),
        )
        lines = []
        step = 0
        remedy = "pass a smaller `batch_size` or `width`"
        with memory_errors(options.batch_size, remedy), track("label fit", total) as progress:
            for epoch in range(options.epochs):
                self.network.train()
                order = permuted(len(train), seed=options.seed, stream=f"label-{epoch}")
                view_draws = permuted(len(train), seed=options.seed, stream=f"label-views-{epoch}")
                views = view_draws % self._cache.num_views
                losses = []
                for start in range(0, len(train), options.batch_size):
                    chosen = slice(start, start + options.batch_size)
                    loss = self._loss(train.take(order[chosen]), views[chosen])
                    optimization.backward(loss)
                    optimization.update(step)
                    step += 1
                    losses.append(float(loss.detach()))
                    progress.advance(1, f"loss {losses[-1]:.4f}")
                if not math.isfinite(sum(losses)):
                    raise TrainingError(
                        f"the loss is not finite in epoch {epoch}; pass a lower `lr`, or run "
                        "dtcache verify on the cache"
                    )
                line = {"epoch": epoch, "step": step, "loss": sum(losses) / len(losses)}
                if len(held_out):
                    scores = self.scores(held_out)
                    line |= {f"validation_{name}": value for name, value in scores.items()}
                lines.append(line)
        return lines

    def scores(self, held_out: LabelledRows) -> Json:
        """Return `label_scores` of the predictions on unmirrored images."""
        num_classes = len(held_out.classes)
        counts: Counts = np.zeros((num_classes, num_classes), np.int64)
        for start in range(0, len(held_out), AT_ONCE):
            batch = held_out.take(range(start, min(start + AT_ONCE, len(held_out))))
            counts += confusion_matrix(
                batch.truth_NHW.numpy(), self._predicted(batch), num_classes, batch.ignore
            )
        return label_scores(counts, len(held_out), self._spec.level)

    def picture(self, shown: LabelledRows) -> bytes:
        """Return a PNG of masks and predictions, and of the images if the cache has them."""
        images = self._cache.images(shown.rows) if self._cache.has_images else None
        masks = list(shown.truth_NHW.numpy())
        return label_picture(
            images, masks, list(self._predicted(shown)), len(shown.classes), shown.ignore
        )

    def _loss(self, batch: LabelledRows, views: Rows) -> Tensor:
        mirrored_B = torch.tensor(
            [self._cache.reader.manifest.is_mirrored(int(view)) for view in views]
        )
        truth_BHW = torch.where(mirrored_B[:, None, None], batch.truth_NHW.flip(2), batch.truth_NHW)
        loss = cross_entropy if self._spec.level == "image" else interpreter_loss
        return loss(self._logits(batch, views), truth_BHW.to(self._compute.device), batch.ignore)

    def _logits(self, batch: LabelledRows, views: Rows) -> Tensor:
        """Return logits (B, K, H, W) on the grid of the truth."""
        coefficients, _ = self._cache.coefficients(batch.rows, views, list(self._spec.shapes))
        maps = self._decoder(
            {name: values.to(self._compute.device) for name, values in coefficients.items()}
        )
        return resize(self.network(maps), batch.truth_NHW.shape[1:])

    @torch.no_grad()
    def _predicted(self, batch: LabelledRows) -> NDArray[np.uint8]:
        """Return class numbers (B, H, W) of the unmirrored view: uint8, int64 for image labels."""
        self.network.eval()
        logits = self._logits(batch, np.zeros(len(batch), np.int64))
        dtype = np.uint8 if self._spec.level == "pixel" else np.int64
        return logits.argmax(1).cpu().numpy().astype(dtype)
