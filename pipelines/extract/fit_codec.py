"""Fits a cache's codec: once, in the coordinating process, before the shards."""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from dtcache.atomic_files import disk_errors
from dtcache.codec import TapCodec, sha256_fit
from dtcache.codec.fit import Solved, TapStatistics, half_fits, solve_step, tap_statistics
from dtcache.errors import CodecError, ImagesError
from dtcache.images import load_views
from dtcache.recipe import CodecSpec, tap_name
from dtcache.whitening import whiten
from pipelines.extract.plan import ExtractionPlan
from pipelines.size_estimate import FeatureSize
from pipelines.terminal.progress import track

FIT_DRAWS = 2
"""Noise draws that the codec is fitted on, to separate noise from what the image determines."""
MAX_FIT_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecFit:
    """A fitted codec and its estimated size."""

    spec: CodecSpec
    fit: Mapping[str, TapCodec]
    """By array."""
    bytes_per_view: float
    """All stored bytes per view except those of images."""


def fit_rows(count: int) -> int:
    """Return how many leading rows of `count` the codec is fitted on."""
    return min(MAX_FIT_ROWS, count)


def fit_draws(plan: ExtractionPlan) -> int:
    """Return how many noise draws the codec is fitted on: one if the teacher takes no noise."""
    return FIT_DRAWS if plan.teacher.is_random else 1


def fit_codec(out: Path, plan: ExtractionPlan, rows: int) -> CodecFit:
    """Fit every tap on the first rows and two noise draws; solve the step for the plan's ratio.

    If the plan has no ratio, features stay float16 and only their statistics are fitted. If draws
    are averaged, the fit uses two averages of separate draws. Features are spooled to a folder in
    `out`, which is removed at the end. Raises ImagesError if no image of these rows can be decoded,
    CodecError if the teacher's output is not finite, and DiskError.
    """
    spool = out / ".tmp-fit"
    shutil.rmtree(spool, ignore_errors=True)
    with disk_errors(spool):
        spool.mkdir(parents=True)
    threads = torch.get_num_threads()
    try:
        whitened = _spool_features(spool, plan, rows)
        torch.set_num_threads(1)
        with threadpool_limits(1), track("fit codec", len(whitened) + 1) as progress:
            statistics = {}
            for name, maps in whitened.items():
                statistics[name] = tap_statistics(maps)
                progress.advance(1, name)
            solved = _solve(statistics, plan)
            progress.advance()
        del whitened
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(spool, ignore_errors=True)
    # A tap that is constant has no variance; its share of noise is 0, not NaN.
    energy = {name: max(float(s.variance.sum()), 1e-12) for name, s in statistics.items()}
    shares = {
        name: float((s.noise_share * s.variance).sum()) / energy[name]
        for name, s in statistics.items()
    }
    spec = CodecSpec(
        name="float16" if plan.ratio is None else "pca-dct-rans",
        ratio=plan.ratio,
        step=solved.step,
        fit_rows=rows,
        fit_sha256=sha256_fit(solved.fit),
        noise_share=shares,
        noise_floor={
            name: float((s.noise_share * s.variance).mean()) for name, s in statistics.items()
        },
        determined_error=solved.determined_error,
    )
    return CodecFit(spec=spec, fit=solved.fit, bytes_per_view=solved.bytes_per_view)


def _solve(statistics: dict[str, TapStatistics], plan: ExtractionPlan) -> Solved:
    """Return the codec with the plan's ratio, or float16 if the plan has no ratio."""
    if plan.ratio is None:
        return half_fits(statistics)
    target = sum(2 * s.variance.size for s in statistics.values()) / plan.ratio
    size = FeatureSize(images=len(plan.samples), views=plan.num_views, target=target)
    return solve_step(statistics, lambda fit: size.bytes_per_view(fit, statistics), target)


def _spool_features(spool: Path, plan: ExtractionPlan, rows: int) -> dict[str, np.memmap]:
    """Write whitened features of the fit's rows to fp16 memory maps (draws, M, C, H, W) by array.

    Flips alternate over the rows, so that the fit includes mirrored images.
    """
    indices = [plan.samples[row].index for row in range(rows)]
    loaded = list(load_views(plan.source, indices, plan.view, threads=2))
    pixels = {
        row: view.pixels_CHW for row, view in enumerate(loaded) if view.pixels_CHW is not None
    }
    if not pixels:
        raise ImagesError(
            f"none of the first {rows} images can be decoded ({loaded[0].failure}); check the "
            "source"
        )
    spec = plan.teacher.spec
    decoded = list(pixels)
    num_draws = fit_draws(plan)
    maps = {}
    for t in spec.timesteps:
        for tap in spec.taps:
            path = spool / f"t{t}-{tap.name}"
            shape = (num_draws, len(decoded), tap.channels, tap.height, tap.width)
            # Allocated now: writing to a page of a sparse file on a full disk kills the process.
            with disk_errors(path), open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
            maps[tap_name(t, tap.name)] = np.memmap(path, np.float16, "r+", shape=shape)
    with track("fit features", num_draws * len(decoded)) as progress:
        for draw in range(num_draws):
            for start in range(0, len(decoded), spec.batch_size):
                batch = decoded[start : start + spec.batch_size]
                flips = [plan.flips[row % len(plan.flips)] for row in batch]
                averaged = plan.options.draws if plan.options.average else 1
                numbers = range(draw * averaged, (draw + 1) * averaged)
                inputs = [
                    plan.input(pixels[row], row, flip, numbers)
                    for row, flip in zip(batch, flips, strict=True)
                ]
                draws = list(plan.teacher.features(plan.teacher.batch(inputs)))
                for name in draws[0]:
                    mean_BCHW = torch.stack([whiten(raw[name])[0] for raw in draws]).mean(0)
                    maps[name][draw, start : start + len(batch)] = mean_BCHW.half().cpu().numpy()
                progress.advance(len(batch))
    for name, array in maps.items():
        if not np.isfinite(array).all():
            raise CodecError(
                f"the teacher's output is not finite at {name}; try `precision='fp32'`"
            )
    return maps
