"""What gives the maps that a segmentation head reads: a backbone, or a cache's taps. B images a batch."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.cache.cache import Cache
from dtcache.device import Compute
from dtcache.errors import ConfigError, TrainingError
from dtcache.options import EvaluateOptions
from dtcache.recipe import ViewSpec
from dtcache.store.layout import MANIFEST
from dtcache.student import Augmentation, probe_maps
from dtcache.student.segmentation_heads import Shapes
from pipelines.evaluate.cache_features import CachedMaps
from pipelines.evaluate.image_split import EvaluatedImages
from pipelines.evaluate.masked_images import MaskedBatch
from pipelines.evaluate.pooled_features import NetworkFeatures, open_backbone, stack_pixels


class Trunk(Protocol):
    """What gives the maps that a head reads."""

    @property
    def name(self) -> str:
        """The backbone's timm name, or `cache`."""

    @property
    def view(self) -> ViewSpec:
        """What it wants to see of an image; masks are of this size too."""

    @property
    def shapes(self) -> Shapes:
        """(C, H, W) of its maps, finest first."""

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the images that maps are made of."""

    @property
    def backbone(self) -> nn.Module | None:
        """What there is to finetune."""

    @property
    def mirrors(self) -> bool:
        """Whether it has maps of mirrored images."""

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Look at the images before any maps are asked for."""

    def maps(
        self,
        batch: MaskedBatch,
        mirrored_B: NDArray[np.bool_],
        augmentation: Augmentation | None,
        step: int,
    ) -> list[Tensor]:
        """Return the maps of images, mirrored where told, then cropped and jittered by `augmentation` as of a step."""


class NetworkTrunk:
    """A backbone, frozen in evaluation mode unless it is finetuned."""

    mirrors = True

    def __init__(
        self, model: str, options: EvaluateOptions, batch_size: int, compute: Compute
    ) -> None:
        """Open a backbone folder or a timm name. Raises ConfigError where it is neither."""
        backbone, view, size = open_backbone(model, options)
        self.view = ViewSpec(height=size[0], width=size[1], fit=view.fit) if options.size else view
        self.name = backbone.name
        self.backbone = backbone
        self.input_size = size
        self.shapes = probe_maps(backbone, size, "--size")
        self._features = NetworkFeatures(backbone, self.view, size, batch_size, compute)
        self._finetune = options.finetune

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Calibrate batch normalisations that were never trained."""
        self._features.prepare(train, test)

    def maps(
        self,
        batch: MaskedBatch,
        mirrored_B: NDArray[np.bool_],
        augmentation: Augmentation | None,
        step: int,
    ) -> list[Tensor]:
        """Return the maps of images."""
        images_BCHW = mirror(stack_pixels(batch.loaded), mirrored_B)
        if augmentation is not None:
            images_BCHW = augmentation.images(images_BCHW, step, batch.rows, self.input_size)
        with torch.set_grad_enabled(self._finetune and torch.is_grad_enabled()):
            found: list[Tensor] = self.backbone(self._features.normalised(images_BCHW))
        return found


class CacheTrunk:
    """All taps of a cache: draw 0, in the whitened scale that students learn."""

    name = "cache"
    backbone = None

    def __init__(self, root: Path, options: EvaluateOptions, compute: Compute) -> None:
        """Open a cache. Raises ConfigError for options that it cannot serve, and what opening raises."""
        fixed = {
            "--finetune": options.finetune,
            f"--head {options.head}": options.head != "linear",
            "--size": options.size,
        }
        for flag, given in fixed.items():
            if given:
                raise ConfigError(
                    f"{flag}: expected with a backbone, got the cache {root}; its features are fixed"
                )
        self._maps = CachedMaps(Cache(root), options.teacher, compute)
        cache = self._maps.cache
        self.view = cache.view
        self.mirrors = cache.reader.manifest.is_mirrored(1)
        self.input_size = self.view.height, self.view.width
        self._names = sorted(cache.names, key=lambda name: -cache.shape(name)[1])
        self.shapes = [cache.shape(name) for name in self._names]

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Raise where neither cache nor teacher serve the images."""
        self._maps.require(train, test)

    def maps(
        self,
        batch: MaskedBatch,
        mirrored_B: NDArray[np.bool_],
        augmentation: Augmentation | None,
        step: int,
    ) -> list[Tensor]:
        """Return the maps of images. Raises TrainingError where the teacher's output is not finite."""
        assert augmentation is None, "a cache is not finetuned"
        found = self._maps(batch.loaded, batch.samples, mirrored=mirrored_B.tolist())
        for sample, *values in zip(batch.samples, *found.values(), strict=True):
            if not all(bool(x.isfinite().all()) for x in values):
                raise TrainingError(
                    f"the teacher's features of image {sample.key} are not finite; leave the image out"
                )
        return [found[name] for name in self._names]


def open_trunk(model: str, options: EvaluateOptions, batch_size: int, compute: Compute) -> Trunk:
    """Return what a model gives maps by. Raises ConfigError where it is of no known kind, and what its parts raise."""
    if (Path(model) / MANIFEST).is_file():
        return CacheTrunk(Path(model), options, compute)
    return NetworkTrunk(model, options, batch_size, compute)


def mirror(x_B_W: Tensor, mirrored_B: NDArray[np.bool_]) -> Tensor:
    """Return images, or masks, of which those told are mirrored."""
    flips_B = torch.from_numpy(mirrored_B).view(-1, *(1,) * (x_B_W.ndim - 1))
    return torch.where(flips_B, x_B_W.flip(-1), x_B_W)
