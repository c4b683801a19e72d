"""A cache's feature maps of any images: read if cached, else computed by the cache's teacher.

B images per batch; maps are (B, C, H, W).
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dtcache.cache.cache import Cache
from dtcache.class_names import class_difference
from dtcache.codec import FeatureEncoder, HostDecoder
from dtcache.device import Compute
from dtcache.errors import ConfigError, ImagesError
from dtcache.images import ImageSource, LoadedView
from dtcache.payloads import pack
from dtcache.recipe import Sample
from dtcache.teacher import Teacher
from pipelines.evaluate.image_split import EvaluatedImages, load_batches
from pipelines.extract.teacher_classes import require_teacher_classes
from pipelines.make_teacher import cache_teacher
from pipelines.terminal.output import say

SURVEY_BATCH = 256


class CachedMaps:
    """Decoded whitened maps of a cache's taps, draw 0: read from the cache, or from its teacher."""

    def __init__(self, cache: Cache, teacher: str | None, compute: Compute) -> None:
        """Index the cache by image content. Raises ConfigError if `teacher` is not the cache's."""
        self.cache = cache
        self._compute = compute
        rows = cache.reader.usable_rows
        content = cache.reader.samples.take(rows)["content_sha256"].to_pylist()
        self._row_of = dict(zip(content, rows.tolist(), strict=True))
        self._decoder = cache.decoder(cache.names).to(compute.device)
        manifest = cache.reader.manifest
        self._teacher = (
            cache_teacher(cache.reader.root, manifest, teacher, str(compute.device))
            if teacher
            else None
        )
        condition = manifest.recipe["teacher"].get("condition", {})
        self._conditioned_on_labels = condition.get("kind") == "label"
        self._encoder = FeatureEncoder(cache.fit, compute.device)
        self._host = HostDecoder(cache.fit)

    def require(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Raise ConfigError if images are not in the cache and there is no teacher to compute them.

        Raises ImagesError if the teacher is conditioned on labels and these images have other
        classes than the cache. Warns of a teacher that is conditioned on labels.
        """
        if self._conditioned_on_labels:
            say(
                f"warning: the teacher of {self.cache.reader.location} was conditioned on each "
                "image's label; a probe may read the label from the features"
            )
        if self._teacher is not None:
            for images in (train, test):
                self._require_labels(self._teacher, images.source)
            return
        missing = total = 0
        for images in (train, test):
            for batch in load_batches(images, self.cache.view, SURVEY_BATCH):
                decoded = [loaded for loaded in batch if loaded.pixels_CHW is not None]
                missing += sum(_content(loaded) not in self._row_of for loaded in decoded)
                total += len(decoded)
        if missing:
            raise ConfigError(
                f"{self.cache.reader.location}: {missing} of {total} images are not in the cache; "
                "pass the cache's `teacher` to compute their features, or pass cached images only"
            )

    @torch.no_grad()
    def __call__(
        self,
        batch: Sequence[LoadedView],
        samples: Sequence[Sample],
        reduce: Callable[[Tensor], Tensor] = lambda x_BCHW: x_BCHW,
        mirrored: Sequence[bool] | None = None,
    ) -> dict[str, Tensor]:
        """Return `reduce` of maps (B, C, H, W), fp32 on the device, by array.

        `batch` and `samples` are parallel lists. `mirrored` selects the maps of mirrored images,
        which a cache with flips has. Maps are NaN if the teacher's output is not finite.
        """
        names = self.cache.names
        flips = list(mirrored) if mirrored is not None else [False] * len(batch)
        reduced: dict[str, list[Tensor | None]] = {name: [None] * len(batch) for name in names}

        def put(name: str, positions: Sequence[int], coefficients_BN: Tensor) -> None:
            maps = self._decoder({name: coefficients_BN.to(self._compute.device)})[name]
            for position, value in zip(positions, reduce(maps), strict=True):
                reduced[name][position] = value

        row_of = [self._row_of.get(_content(loaded)) for loaded in batch]
        cached = [i for i, row in enumerate(row_of) if row is not None]
        if cached:
            rows = [row for row in row_of if row is not None]
            coefficients, _ = self.cache.coefficients(rows, [int(flips[i]) for i in cached], names)
            for name in names:
                put(name, cached, coefficients[name])
        missing = [i for i, row in enumerate(row_of) if row is None]
        step = self._teacher.spec.batch_size if self._teacher else len(batch)
        for start in range(0, len(missing), step):
            chunk = missing[start : start + step]
            draws = self._raw_draws(
                [batch[i] for i in chunk], [samples[i] for i in chunk], [flips[i] for i in chunk]
            )
            for name in names:
                encoded = self._encoder.encode(name, *(raw[name] for raw in draws))
                finite = [i for i, view in enumerate(encoded) if view.finite]
                if finite:
                    sections = pack([encoded[i].section for i in finite])
                    values, _ = self._host.decode(name, sections)
                    put(name, [chunk[i] for i in finite], values)
        return {name: self._stacked(name, reduced[name], reduce) for name in names}

    def _stacked(
        self, name: str, values: list[Tensor | None], reduce: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return values as one tensor; NaN for None."""
        nan_1CHW = torch.full((1, *self.cache.shape(name)), torch.nan, device=self._compute.device)
        return torch.stack([reduce(nan_1CHW)[0] if value is None else value for value in values])

    def _require_labels(self, teacher: Teacher, source: ImageSource) -> None:
        teacher.require_labels(source.keys, source.labels)
        require_teacher_classes(teacher, source)
        cached = self.cache.reader.manifest.classes
        if not (self._conditioned_on_labels and cached and source.classes):
            return
        difference = class_difference(cached, source.classes)
        if difference is not None:
            raise ImagesError(
                f"expected the classes of {self.cache.reader.location}, on which its teacher is "
                f"conditioned, the first list, got others: {difference}. Labels are numbers of "
                "these classes; use the same classes in both"
            )

    def _raw_draws(
        self, batch: Sequence[LoadedView], samples: Sequence[Sample], flips: Sequence[bool]
    ) -> list[dict[str, Tensor]]:
        """Return the teacher's raw features (B, C, H, W) by array, under the cache's recipe.

        One dictionary per draw: draw 0 alone, or all draws that the cache averages. Raises
        ConfigError without a teacher.
        """
        if self._teacher is None:
            raise ConfigError(
                f"{self.cache.reader.location}: {len(batch)} images are not in the cache; pass the "
                "cache's `teacher` to compute their features"
            )
        recipe = self.cache.reader.manifest.recipe
        draws = range(recipe["draws"] if recipe["average"] else 1)
        inputs = [
            self._teacher.input(
                loaded.pixels_CHW,
                sample.key,
                flip,
                seed=recipe["seed"],
                draws=draws,
                label=sample.label,
            )
            for loaded, sample, flip in zip(batch, samples, flips, strict=True)
            if loaded.pixels_CHW is not None
        ]
        return list(self._teacher.features(self._teacher.batch(inputs)))


def _content(loaded: LoadedView) -> bytes:
    return hashlib.sha256(loaded.source).digest()
