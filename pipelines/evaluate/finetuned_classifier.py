"""Classification accuracy after finetuning: a linear classifier and its backbone, trained together.

B images per batch of H x W pixels, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtcache.device import Compute
from dtcache.device_memory import memory_errors
from dtcache.hashing import sha256_json
from dtcache.images import LoadedView
from dtcache.optim import Optimization, OptimizationSpec
from dtcache.options import EvaluateOptions
from dtcache.student.backbone import Backbone
from pipelines.evaluate.dense_features import mirror
from pipelines.evaluate.evaluation_folder import evaluation_folder
from pipelines.evaluate.finetuning import (
    BACKBONE_LR,
    HEAD_LR,
    WARMUP_SHARE,
    WEIGHT_DECAY,
    finetuning_augmentation,
    mirror_draws,
)
from pipelines.evaluate.fitting import Schedule, default_epochs, fit
from pipelines.evaluate.image_split import EvaluatedImages, load_batches
from pipelines.evaluate.pooled_features import EvaluatedBackbone, NetworkFeatures, stack_pixels
from pipelines.terminal.progress import track

BATCH_SIZE = 32
EPOCHS = 30
TOP = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetunedAccuracy:
    """Test images that the finetuned network classifies correctly."""

    top1: float
    """Per cent."""
    top5: float | None
    """Images whose class is among the five of the highest scores; None for at most five classes."""


class Classifier(nn.Module):
    """A backbone and a linear layer on the spatial mean of its coarsest map."""

    def __init__(self, backbone: Backbone, channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.score = nn.Linear(channels, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return scores (B, K) of normalised images."""
        scores: Tensor = self.score(self.backbone.pooled(x_BCHW))
        return scores


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierTraining:
    """A classifier on its device, with what it is trained on: the learner of finetuning."""

    network: Classifier
    optimization: Optimization
    features: NetworkFeatures
    images: EvaluatedImages
    """The training images."""
    seed: int
    compute: Compute

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""
        self.network.train(mode)

    def batches(self, positions: Sequence[int], size: int) -> Iterator[list[LoadedView]]:
        """Yield the training images at these positions that can be decoded."""
        order = self.images.indices
        chosen = self.images.chosen([order[position] for position in positions])
        return decoded_batches(chosen, self.features, size)

    def loss(self, batch: list[LoadedView], step: int) -> Tensor:
        """Return the cross-entropy of a batch: mirrored, cropped and with jittered colours."""
        rows = torch.tensor([view.index for view in batch]).numpy()
        images_BCHW = mirror(stack_pixels(batch), mirror_draws(self.seed, step, rows) < 0.5)
        augmentation = finetuning_augmentation(self.seed)
        images_BCHW = augmentation.images(images_BCHW, step, rows, self.features.input_size)
        with self.compute.autocast():
            scores_BK = self.network(self.features.normalised(images_BCHW))
        truth_B = labels_of(self.images, batch).to(self.compute.device)
        return F.cross_entropy(scores_BK.float(), truth_B)

    @torch.no_grad()
    def accuracy(self, test: EvaluatedImages, batch_size: int) -> FinetunedAccuracy:
        """Return the accuracy on the test images that can be decoded."""
        first = 0
        among = 0
        total = 0
        num_classes = self.network.score.out_features
        with track("finetuned", len(test.indices)) as progress:
            for batch in decoded_batches(test, self.features, batch_size):
                with self.compute.autocast():
                    scores_BK = self.network(self.features.normalised(stack_pixels(batch)))
                truth_B1 = labels_of(test, batch)[:, None]
                best = scores_BK.float().cpu().topk(min(TOP, num_classes), 1).indices == truth_B1
                first += int(best[:, 0].sum())
                among += int(best.sum())
                total += len(batch)
                progress.advance(len(batch))
        top5 = 100 * among / total if num_classes > TOP else None
        return FinetunedAccuracy(top1=100 * first / total, top5=top5)


def finetune_classifier(
    model: str,
    options: EvaluateOptions,
    evaluated: EvaluatedBackbone,
    train: EvaluatedImages,
    test: EvaluatedImages,
    compute: Compute,
) -> FinetunedAccuracy:
    """Finetune a backbone with a linear classifier, and return its accuracy on the test images.

    The recipe is AdamW, linear warm-up, cosine decay, cross-entropy, crops and colour jitter. On a
    CPU the result is a pure function of the model, the images, the labels and the options. Raises
    TrainingError if a loss is not finite. The images are those of the probes, some of which can be
    decoded.
    """
    batch_size = options.batch_size or BATCH_SIZE
    with torch.random.fork_rng(devices=[compute.device] if compute.device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        num_classes = 1 + int(max(all_labels(train).max(), all_labels(test).max()))
        features = NetworkFeatures(evaluated, batch_size, compute)
        features.prepare(train, test)
        channels = evaluated.backbone.channels[-1]
        network = Classifier(evaluated.backbone, channels, num_classes).to(compute.device)
        num_images = len(train.indices)
        schedule = Schedule(
            num_images=num_images,
            batch_size=batch_size,
            epochs=options.epochs or default_epochs(EPOCHS, num_images, batch_size),
            seed=options.seed,
        )
        spec = OptimizationSpec(
            lr=options.lr or HEAD_LR,
            weight_decay=WEIGHT_DECAY,
            warmup_steps=round(WARMUP_SHARE * schedule.total_steps),
            total_steps=schedule.total_steps,
        )
        optimization = Optimization(network.score, spec)
        optimization.add(network.backbone, BACKBONE_LR)
        learner = ClassifierTraining(
            network=network,
            optimization=optimization,
            features=features,
            images=train,
            seed=options.seed,
            compute=compute,
        )
        data = sha256_json([_identity(train), _identity(test)])
        with (
            evaluation_folder(model, options, data, network) as folder,
            memory_errors(batch_size, "pass a smaller `batch_size`"),
        ):
            fit("finetuning", learner, schedule, folder)
            return learner.accuracy(test, batch_size)


def decoded_batches(
    images: EvaluatedImages, features: NetworkFeatures, size: int
) -> Iterator[list[LoadedView]]:
    """Yield the images that can be decoded, in order, at most `size` at a time."""
    for batch in load_batches(images, features.view, size):
        if decoded := [view for view in batch if view.pixels_CHW is not None]:
            yield decoded


def labels_of(images: EvaluatedImages, batch: Sequence[LoadedView]) -> Tensor:
    """Return the labels (B,) of a batch; the source has a label for every image."""
    labels = images.source.labels or []
    return torch.tensor([labels[view.index] for view in batch])


def all_labels(images: EvaluatedImages) -> Tensor:
    """Return the labels (N,) of all images of a set."""
    labels = images.source.labels or []
    return torch.tensor([labels[index] for index in images.indices])


def _identity(images: EvaluatedImages) -> list[object]:
    keys = images.source.keys
    return [[keys[index] for index in images.indices], all_labels(images).tolist()]
