"""The codec's error remeasured: the teacher runs on some samples, and its features are compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.cache.cache import Cache
from dtcache.device import resolve_compute
from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.options import InspectOptions
from dtcache.process_settings import cpu_threads
from dtcache.recipe import Json
from dtcache.store.remote import Location
from dtcache.teacher import Teacher
from dtcache.whitening import whiten
from pipelines.inspect.statistics.compute import chosen_rows
from pipelines.inspect.statistics.decode import Rows, decode
from pipelines.inspect.statistics.jackknife import Estimate, jackknife
from pipelines.make_teacher import cache_teacher
from pipelines.terminal.progress import track

MOST_ROWS = 64
MOST_WORST = 10
"""Samples with the largest errors that the JSON lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remeasured:
    """The teacher's features of R rows, computed again, and their distance from the cached ones."""

    rows: Rows
    keys: list[str]
    errors: dict[str, NDArray[np.float64]]
    """By array, (R,): squared error of the decoded map over the energy of the original map about
    the channel means; both whitened."""
    error: dict[str, Estimate | None]
    """By array: the same ratio over all R rows together."""
    originals: dict[str, NDArray[np.float16]]
    """By array, (R, C, H, W): the teacher's whitened features of the first view."""

    def worst(self) -> list[int]:
        """Return indices into `rows`, the largest mean error over arrays first."""
        order: list[int] = np.argsort(
            -np.mean(list(self.errors.values()), 0), kind="stable"
        ).tolist()
        return order

    def to_json(self) -> Json:
        """Return the errors as JSON values."""
        return {
            "num_rows": len(self.rows),
            "codec_error": {
                name: estimate.to_json() if estimate else None
                for name, estimate in self.error.items()
            },
            "worst": [
                {
                    "key": self.keys[index],
                    "codec_error": {name: float(e[index]) for name, e in self.errors.items()},
                }
                for index in self.worst()[:MOST_WORST]
            ],
        }


def remeasure(root: Location, where: str, options: InspectOptions) -> Remeasured:
    """Run the teacher `where` of a cache on up to 64 of the samples of the statistics.

    Raises CacheDamagedError if no sample can be read, ConfigError if `where` is a different
    teacher, and ConfigError if neither the cache nor `options.images` has the images.
    """
    cache = Cache(root, options.images, allow="damage", reading=options.reading)
    manifest = cache.reader.manifest
    rows = chosen_rows(cache, options)[:MOST_ROWS]
    decoded = {}
    for name in cache.names:
        decoded[name] = decode(cache, name, rows)
        rows = decoded[name].rows
    if not len(rows):
        raise CacheDamagedError(
            f"{root}: none of the samples for the teacher can be read at every tap; {AGAIN}"
        )
    device = str(resolve_compute(options.device, manifest.recipe["teacher"]["precision"]).device)
    teacher = cache_teacher(cache.reader.root, manifest, where, device)
    originals = dict[str, list[Tensor]]()
    step = teacher.spec.batch_size
    with cpu_threads(manifest.recipe.get("threads")), track("teacher", len(rows)) as progress:
        for start in range(0, len(rows), step):
            batch = rows[start : start + step]
            for name, maps_BCHW in _teacher_features(cache, teacher, batch).items():
                originals.setdefault(name, []).append(maps_BCHW)
            progress.advance(len(batch))
    errors = {}
    error = {}
    kept = {}
    sampled = len(rows) / len(cache.reader.usable_rows)
    for name, batches in originals.items():
        original_RCHW = torch.cat(batches)
        # Rows that another array lacks are dropped from all; every array keeps the order of `rows`.
        decoded_RCHW = decoded[name].whitened_RVCHW[np.isin(decoded[name].rows, rows), 0]
        mean_C11 = torch.from_numpy(cache.fit[name].mean).double()[:, None, None]
        squared_R = (decoded_RCHW - original_RCHW).double().square().sum((1, 2, 3)).numpy()
        energy_R = (original_RCHW.double() - mean_C11).square().sum((1, 2, 3)).numpy()
        errors[name] = squared_R / np.maximum(energy_R, 1e-12)
        pairs = list(zip(squared_R.tolist(), energy_R.tolist(), strict=True))
        error[name] = jackknife(pairs, _ratio, sampled)
        kept[name] = original_RCHW.half().numpy()
    keys = [cache.samples["key"][int(row)].as_py() for row in rows]
    return Remeasured(rows=rows, keys=keys, errors=errors, error=error, originals=kept)


def _teacher_features(cache: Cache, teacher: Teacher, rows: Rows) -> dict[str, Tensor]:
    """Return the first view's whitened features by array, fp32 (B, C, H, W).

    They are those of draw 0, or the mean over the draws if the cache stores the mean.
    """
    recipe = cache.reader.manifest.recipe
    draws = range(recipe["draws"] if recipe["average"] else 1)
    labels = cache.samples["label"]
    inputs = [
        teacher.input(
            pixels,
            cache.samples["key"][int(row)].as_py(),
            False,
            seed=recipe["seed"],
            draws=draws,
            label=labels[int(row)].as_py(),
        )
        for pixels, row in zip(cache.images(rows), rows, strict=True)
    ]
    by_draw = list(teacher.features(teacher.batch(inputs)))
    return {
        name: torch.stack([whiten(raw[name])[0].cpu() for raw in by_draw]).mean(0)
        for name in by_draw[0]
    }


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    squared, energy = np.sum(np.array(pairs), 0)
    return float(squared / energy) if energy > 0 else float("nan")
