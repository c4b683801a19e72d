"""Judging features by a task: by probes on labelled images here, by segmentation in segment.py."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from dtcache.device import configure_process, memory_errors, resolve_compute
from dtcache.errors import ImagesError
from dtcache.images import ImageSource, open_source
from dtcache.metrics.probes import Features, Labels, knn_predict, linear_predict
from dtcache.options import EvaluateOptions
from dtcache.recipe import Json, Sample
from pipelines.evaluate.image_split import EvaluatedImages, load_batches, split_images
from pipelines.evaluate.pooled_features import ALL_TAPS, BATCH_SIZE, Extractor, open_model
from pipelines.evaluate.segmentation import SegmentationResult, segment
from pipelines.terminal.progress import track


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """What the probes found on one kind of features."""

    name: str
    """The backbone, `pixels`, a tap's array such as t150/stride8, or `all` for all taps side by side."""
    knn_top1: float
    """Test images that k-NN gets right, per cent."""
    linear_top1: float
    """Test images that the linear probe gets right, per cent."""
    num_train: int
    num_test: int
    feature_dim: int
    linear_c: float
    """The inverse strength of the linear probe's L2 penalty, chosen on training images."""

    def to_json(self) -> Json:
        """Return the result as JSON values."""
        return {
            "name": self.name,
            "knn_top1": self.knn_top1,
            "linear_top1": self.linear_top1,
            "num_train": self.num_train,
            "num_test": self.num_test,
            "feature_dim": self.feature_dim,
            "linear_C": self.linear_c,
        }


def evaluate(model: str, options: EvaluateOptions) -> list[ProbeResult] | SegmentationResult:
    """Judge a backbone folder, a timm name (random weights), a cache or `pixels` by the task that options name.

    Raises ConfigError for options of the other task, and what `classify` and `segment` raise.
    """
    return segment(model, options) if options.task == "segmentation" else classify(model, options)


def classify(model: str, options: EvaluateOptions) -> list[ProbeResult]:
    """Probe the pooled features of a backbone folder, a timm name (random weights), a cache or `pixels`.

    Every row of the result saw the same images, a pure function of keys, options and seed. Raises ConfigError for a
    model that is none of these, ImagesError for images without labels, and what the model's parts raise.
    """
    options.require_task("classification")
    compute = resolve_compute(options.device, options.precision)
    configure_process(compute.device)
    batch_size = options.batch_size or BATCH_SIZE
    train, test = split_labelled(options)
    extractor = open_model(model, options, compute)
    extractor.prepare(train, test)
    with memory_errors(batch_size, "give a smaller --batch-size"):
        train_features, train_labels = pooled_features(extractor, train, batch_size)
        test_features, test_labels = pooled_features(extractor, test, batch_size)
    results = []
    with track("probe", len(train_features)) as progress:
        for name, train_ND in train_features.items():
            test_MD = test_features[name]
            knn = knn_predict(train_ND, train_labels, test_MD, options.neighbours, compute.device)
            linear, c = linear_predict(train_ND, train_labels, test_MD)
            results.append(
                ProbeResult(
                    name=name,
                    knn_top1=100 * int((knn == test_labels).sum()) / len(test_labels),
                    linear_top1=100 * int((linear == test_labels).sum()) / len(test_labels),
                    num_train=len(train_ND),
                    num_test=len(test_MD),
                    feature_dim=train_ND.shape[1],
                    linear_c=c,
                )
            )
            progress.advance(1, name)
    return results


def split_labelled(options: EvaluateOptions) -> tuple[EvaluatedImages, EvaluatedImages]:
    """Return the training and the test images of a classification, as many as the limits allow.

    Raises ImagesError where labels are missing or the class names differ.
    """
    train, test = split_images(options, _open_labelled)
    if train.source.classes and test.source.classes and train.source.classes != test.source.classes:
        odd = sorted(set(train.source.classes) ^ set(test.source.classes))
        raise ImagesError(
            f"{options.test}: expected the classes of {options.train}, got others: {', '.join(odd[:5])} are in one "
            "of them only; labels are places in the sorted class names, so both must have the same"
        )
    return train.chosen(train.indices[: options.limit_train]), test.chosen(
        test.indices[: options.limit_test]
    )


def _open_labelled(path: Path) -> ImageSource:
    source = open_source(path, track)
    if source.labels is None or any(label is None or label < 0 for label in source.labels):
        raise ImagesError(
            f"{path}: expected a label for every image, got images without; give a folder with one sub-folder a class, "
            "or Parquet with a column label: int (0 or more)"
        )
    return source


def pooled_features(
    extractor: Extractor, images: EvaluatedImages, batch_size: int
) -> tuple[dict[str, Features], Labels]:
    """Return features (N, D) by name and labels (N,), leaving out, with a warning, images that cannot be used."""
    found: dict[str, list[Features]] = defaultdict(list)
    labels = []
    reasons = []
    with track(images.title, len(images.indices)) as progress:
        for batch in load_batches(images, extractor.view, batch_size):
            good = [loaded for loaded in batch if loaded.pixels_CHW is not None]
            reasons += [str(loaded.failure) for loaded in batch if loaded.pixels_CHW is None]
            if good:
                every = [(images.source.labels or [])[loaded.index] for loaded in good]
                samples = [
                    Sample(index=loaded.index, key=images.source.keys[loaded.index], label=label)
                    for loaded, label in zip(good, every, strict=True)
                ]
                vectors = extractor(good, samples)
                finite_B = (
                    torch.stack([x_BD.isfinite().all(1) for x_BD in vectors.values()])
                    .all(0)
                    .numpy()
                )
                reasons += ["features that are not finite"] * int((~finite_B).sum())
                for name, x_BD in vectors.items():
                    found[name].append(x_BD.numpy()[finite_B])
                labels.append(np.array(every, np.int64)[finite_B])
            progress.advance(len(batch))
    if reasons:
        print(
            f"{len(reasons)} of {len(images.indices)} {images.title} left out ({reasons[0]})",
            file=sys.stderr,
        )
    if len(reasons) == len(images.indices):
        why = f"; all failed ({reasons[0]})" if reasons else ""
        raise ImagesError(
            f"expected {images.title} that can be used, got none{why}; give other images"
        )
    return {name: np.concatenate(parts) for name, parts in found.items()}, np.concatenate(labels)


def results_json(model: str, results: Sequence[ProbeResult] | SegmentationResult) -> Json:
    """Return what came of an evaluation as JSON values; of several rows also the best single one by the linear probe,
    at the top level.
    """
    if isinstance(results, SegmentationResult):
        return {"model": model, **results.to_json()}
    best = _best(results).to_json()
    return {
        "model": model,
        "best": best.pop("name"),
        **best,
        "rows": [result.to_json() for result in results],
    }


def results_table(model: str, results: Sequence[ProbeResult] | SegmentationResult) -> Table:
    """Return a table for people; the best single row is bold."""
    if isinstance(results, SegmentationResult):
        return results.to_table(model)
    first = results[0]
    table = Table(
        title=escape(f"{model}: {first.num_train} training, {first.num_test} test images")
    )
    for heading in ("features", "dims", "k-NN top-1 %", "linear top-1 %", "C"):
        table.add_column(heading, justify="left" if heading == "features" else "right")
    for result in results:
        style = "bold" if len(results) > 1 and result is _best(results) else ""
        cells = (f"{result.knn_top1:.2f}", f"{result.linear_top1:.2f}", f"{result.linear_c:g}")
        table.add_row(result.name, str(result.feature_dim), *cells, style=style)
    return table


def _best(results: Sequence[ProbeResult]) -> ProbeResult:
    return max((r for r in results if r.name != ALL_TAPS), key=lambda r: r.linear_top1)
