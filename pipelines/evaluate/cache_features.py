"""A cache's taps as maps of any of its images, or of others: read where cached, else computed. B images a batch."""

import hashlib
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dtcache.cache.cache import Cache
from dtcache.codec import FeatureEncoder, HostDecoder
from dtcache.device import Compute
from dtcache.errors import ConfigError, ImagesError
from dtcache.images import ImageSource, LoadedView
from dtcache.payloads import pack
from dtcache.recipe import Sample
from pipelines.evaluate.image_split import EvaluatedImages, load_batches
from pipelines.extract.recipe_options import cache_teacher


class CachedMaps:
    """Decoded whitened maps of a cache's taps, draw 0: read where cached, else computed by the teacher."""

    def __init__(self, cache: Cache, teacher: str | None, compute: Compute) -> None:
        """Index the cache by image content. Raises TeacherError where `teacher` is not the one of the cache."""
        self.cache = cache
        self._compute = compute
        rows = cache.reader.usable_rows
        content = cache.reader.samples["content_sha256"].take(rows).to_pylist()
        self._row_of = dict(zip(content, rows.tolist(), strict=True))
        self._decoder = cache.decoder(cache.names).to(compute.device)
        device = str(compute.device)
        self._teacher = (
            cache_teacher(cache.reader.root, cache.reader.manifest, teacher, device)
            if teacher
            else None
        )
        self._tells_labels = (
            cache.reader.manifest.recipe["teacher"].get("condition", {}).get("kind") == "label"
        )
        self._encoder = FeatureEncoder(cache.fit, compute.device)
        self._host = HostDecoder(cache.fit)

    def require(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Raise ConfigError where images are not in the cache and no teacher is there to compute them.

        Raises ImagesError where the teacher is told labels, and these images have others.
        """
        if self._tells_labels:
            print(
                f"warning: the teacher of {self.cache.reader.root} was told each image's label; a probe may find it "
                "in the features",
                file=sys.stderr,
            )
        if self._teacher is not None:
            for images in (train, test):
                self._require_labels(images.source)
            return
        missing = total = 0
        for images in (train, test):
            for batch in load_batches(images, self.cache.view, 256):
                good = [v for v in batch if v.pixels_CHW is not None]
                missing += sum(_content(v) not in self._row_of for v in good)
                total += len(good)
        if missing:
            raise ConfigError(
                f"{self.cache.reader.root}: {missing} of {total} images are not in the cache; give the cache's "
                "--teacher to compute their features, or images that were cached"
            )

    @torch.no_grad()
    def __call__(
        self,
        batch: Sequence[LoadedView],
        samples: Sequence[Sample],
        reduce: Callable[[Tensor], Tensor] = lambda x_BCHW: x_BCHW,
        mirrored: Sequence[bool] | None = None,
    ) -> dict[str, Tensor]:
        """Return what `reduce` makes of maps (B, C, H, W) on the device, fp32 by array; the two lists run together.

        `mirrored` asks for maps of the mirrored images, which a cache with flips has. NaN where the teacher's output is
        not finite.
        """
        names = self.cache.names
        flips = list(mirrored) if mirrored is not None else [False] * len(batch)
        found: dict[str, list[Tensor | None]] = {name: [None] * len(batch) for name in names}

        def put(name: str, places: Sequence[int], coefficients_BN: Tensor) -> None:
            decoded = self._decoder({name: coefficients_BN.to(self._compute.device)})
            for place, value in zip(places, reduce(decoded[name]), strict=True):
                found[name][place] = value

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
            part = missing[start : start + step]
            draws = self._raw_draws(
                [batch[i] for i in part], [samples[i] for i in part], [flips[i] for i in part]
            )
            for name in names:
                encoded = self._encoder.encode(name, *(raw[name] for raw in draws))
                good = [place for place, view in enumerate(encoded) if view.finite]
                if good:
                    values, _ = self._host.decode(
                        name, pack([encoded[place].payload for place in good])
                    )
                    put(name, [part[place] for place in good], values)
        return {name: self._stacked(name, found[name], reduce) for name in names}

    def _stacked(
        self, name: str, values: list[Tensor | None], reduce: Callable[[Tensor], Tensor]
    ) -> Tensor:
        nothing = torch.full((1, *self.cache.shape(name)), torch.nan, device=self._compute.device)
        return torch.stack([reduce(nothing)[0] if value is None else value for value in values])

    def _require_labels(self, source: ImageSource) -> None:
        assert self._teacher is not None, "asked where there is one"
        self._teacher.require_labels(source.keys, source.labels)
        cached = self.cache.reader.manifest.classes
        if self._tells_labels and cached and source.classes and list(cached) != source.classes:
            raise ImagesError(
                f"expected the classes of {self.cache.reader.root}, whose teacher is told them, got others; labels "
                "are places in the sorted class names, so both must have the same"
            )

    def _raw_draws(
        self, batch: Sequence[LoadedView], samples: Sequence[Sample], flips: Sequence[bool]
    ) -> list[dict[str, Tensor]]:
        """Return the teacher's raw features by array under the cache's recipe: draw 0, or all that it averages."""
        assert self._teacher is not None, (
            "require() refuses images that neither cache nor teacher serve"
        )
        recipe = self.cache.reader.manifest.recipe
        draws = range(recipe["draws"] if recipe["average"] else 1)
        inputs = [
            self._teacher.input(
                v.pixels_CHW, sample.key, flip, seed=recipe["seed"], draws=draws, label=sample.label
            )
            for v, sample, flip in zip(batch, samples, flips, strict=True)
            if v.pixels_CHW is not None
        ]
        return list(self._teacher.features(self._teacher.batch(inputs)))


def _content(loaded: LoadedView) -> bytes:
    return hashlib.sha256(loaded.source).digest()
