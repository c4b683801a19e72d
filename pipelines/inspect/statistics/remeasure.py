"""The codec's error measured afresh: the teacher runs again on some samples, and its features meet the decoded ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.cache.cache import Cache
from dtcache.device import cpu_threads, resolve_compute
from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.options import InspectOptions
from dtcache.recipe import Json
from dtcache.teacher import Teacher
from dtcache.whitening import whiten
from pipelines.extract.recipe_options import cache_teacher
from pipelines.inspect.statistics.compute import chosen_rows
from pipelines.inspect.statistics.decode import Rows, decode
from pipelines.inspect.statistics.jackknife import Estimate, jackknife
from pipelines.terminal.progress import track

MOST_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Afresh:
    """What the teacher says of R rows now, beside what is cached of them."""

    rows: Rows
    keys: list[str]
    errors: dict[str, NDArray[np.float64]]
    """By array: (R,) squared error of the decoded map over the original's square about the channel means, whitened."""
    error: dict[str, Estimate | None]
    """By array: the same over all of them together."""
    originals: dict[str, NDArray[np.float16]]
    """By array: (R, C, H, W), whitened, of the first view."""

    def worst(self) -> list[int]:
        """Return places by falling error, the mean over arrays."""
        order: list[int] = np.argsort(
            -np.mean(list(self.errors.values()), 0), kind="stable"
        ).tolist()
        return order

    def to_json(self) -> Json:
        """Return the errors as JSON values."""
        return {
            "num_rows": len(self.rows),
            "codec_error": {
                n: found.to_json() if found else None for n, found in self.error.items()
            },
            "worst": [
                {
                    "key": self.keys[place],
                    "codec_error": {name: float(e[place]) for name, e in self.errors.items()},
                }
                for place in self.worst()[:10]
            ],
        }


def measure_afresh(root: Path, options: InspectOptions) -> Afresh:
    """Run a cache's teacher on up to 64 of the samples that statistics are taken of.

    Raises TeacherError where `options.teacher` is another one, and ConfigError where neither cache nor `options.images`
    has the images.
    """
    cache = Cache(root, options.images, allow="damage")
    assert options.teacher is not None, "asked where one is given"
    manifest = cache.reader.manifest
    rows = chosen_rows(cache, options)[:MOST_ROWS]
    decoded = {}
    for name in cache.names:
        decoded[name] = decode(cache, name, rows)
        rows = decoded[name].rows
    if not len(rows):
        raise CacheDamagedError(
            f"{root}: none of the samples that the teacher would run on can be read; {AGAIN}"
        )
    device = str(resolve_compute(options.device, manifest.recipe["teacher"]["precision"]).device)
    teacher = cache_teacher(root, manifest, options.teacher, device)
    step = teacher.spec.batch_size
    originals = dict[str, list[Tensor]]()
    with cpu_threads(manifest.recipe.get("threads")), track("teacher", len(rows)) as progress:
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            for name, maps_BCHW in _teacher_features(cache, teacher, part).items():
                originals.setdefault(name, []).append(maps_BCHW)
            progress.advance(len(part))
    errors = {}
    error = {}
    kept = {}
    for name, parts in originals.items():
        whole = torch.cat(parts)
        # Rows that another array lacks are left out of all; the order is that of `rows` everywhere.
        found = decoded[name].whitened_RVCHW[np.isin(decoded[name].rows, rows), 0]
        mean = torch.from_numpy(cache.fit[name].mean).double()[:, None, None]
        squares = (found - whole).double().square().sum((1, 2, 3)).numpy()
        energies = (whole.double() - mean).square().sum((1, 2, 3)).numpy()
        errors[name] = squares / np.maximum(energies, 1e-12)
        pairs = list(zip(squares.tolist(), energies.tolist(), strict=True))
        error[name] = jackknife(pairs, _ratio, len(rows) / len(cache.reader.usable_rows))
        kept[name] = whole.half().numpy()
    keys = [cache.samples["key"][int(row)].as_py() for row in rows]
    return Afresh(rows=rows, keys=keys, errors=errors, error=error, originals=kept)


def _teacher_features(cache: Cache, teacher: Teacher, rows: Rows) -> dict[str, Tensor]:
    """Return whitened features (B, C, H, W) of the first view by array: of draw 0, or the mean that is cached."""
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
    found = list(teacher.features(teacher.batch(inputs)))
    return {
        name: torch.stack([whiten(raw[name])[0].cpu() for raw in found]).mean(0)
        for name in found[0]
    }


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    errors, energies = np.sum(np.array(pairs), 0)
    return float(errors / energies) if energies > 0 else float("nan")
