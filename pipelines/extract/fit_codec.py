"""Fitting a cache's codec: once, in the coordinating process, in one thread, before the first shard."""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numcodecs.zstd import compress
from threadpoolctl import threadpool_limits

from dtcache.atomic_files import disk_errors
from dtcache.codec import FittedTap, TapCodec, sha256_fit
from dtcache.codec.fit import Solved, TapStatistics, half_fits, solve_step, tap_statistics
from dtcache.codec.pca_dct import quantise
from dtcache.errors import CodecError, ImagesError
from dtcache.images import load_views
from dtcache.recipe import CodecSpec, tap_name
from dtcache.store.shard import CRC_BYTES, ENTRY_BYTES
from dtcache.store.zstd_frame import ZSTD_LEVEL, pack_frame
from dtcache.whitening import whiten
from pipelines.extract.plan import Job
from pipelines.terminal.progress import track

DRAWS = 2
SIZED_VIEWS = 48
ROW_BYTES = 60
"""Sample index: a hash, a key and a label, compressed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecFit:
    """A fitted codec and what it is expected to cost."""

    spec: CodecSpec
    fit: Mapping[str, TapCodec]
    bytes_per_view: float


def fit_codec(out: Path, job: Job, rows: int, ratio: float | None) -> CodecFit:
    """Fit every tap on the first rows and two noise draws, and solve the step for the target ratio.

    Without a ratio features stay float16, and only their statistics are fitted. Averaged draws are fitted on two
    averages of draws of their own.

    Raises ImagesError where none of these rows has an image, CodecError where the teacher's output is not finite.
    """
    spool = out / ".tmp-fit"
    shutil.rmtree(spool, ignore_errors=True)
    with disk_errors(spool):
        spool.mkdir(parents=True)
    threads = torch.get_num_threads()
    try:
        whitened = _spool_features(spool, job, rows)
        torch.set_num_threads(1)
        with threadpool_limits(1), track("fit codec", len(whitened) + 1) as progress:
            statistics = {}
            for name, maps in whitened.items():
                statistics[name] = tap_statistics(maps)
                progress.advance(1, name)
            solved = _solve(statistics, ratio, len(job.samples), job.views)
            progress.advance()
        del whitened
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(spool, ignore_errors=True)
    # A tap that is the same everywhere has no variance; its share of noise is none, not NaN.
    energy = {name: max(float(s.variance.sum()), 1e-12) for name, s in statistics.items()}
    shares = {
        name: float((s.noise_share * s.variance).sum()) / energy[name]
        for name, s in statistics.items()
    }
    spec = CodecSpec(
        name="float16" if ratio is None else "pca-dct-rans",
        ratio=ratio,
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


def _solve(
    statistics: dict[str, TapStatistics], ratio: float | None, images: int, views: int
) -> Solved:
    """Return the codec of a ratio, or float16 where there is none."""
    if ratio is None:
        return half_fits(statistics)
    target = sum(2 * s.variance.size for s in statistics.values()) / ratio
    return solve_step(
        statistics, lambda fit: bytes_per_view(fit, statistics, target, images, views), target
    )


def _spool_features(spool: Path, job: Job, rows: int) -> dict[str, np.memmap]:
    """Write whitened features of the fit's rows, two draws each, to fp16 memory maps (2, M, C, H, W) by array.

    A teacher without noise has one draw. Views alternate over the rows, so that the fit sees mirrored images too.
    """
    indices = [job.samples[row].index for row in range(rows)]
    loaded = list(load_views(job.source, indices, job.view, threads=2))
    good = [row for row in range(rows) if loaded[row].pixels_CHW is not None]
    if not good:
        raise ImagesError(
            f"none of the first {rows} images can be decoded ({loaded[0].failure}); check the source"
        )
    spec = job.teacher.spec
    fit_draws = DRAWS if job.teacher.is_random else 1
    maps = {}
    for t in spec.timesteps:
        for tap in spec.taps:
            path = spool / f"t{t}-{tap.name}"
            shape = (fit_draws, len(good), tap.channels, tap.height, tap.width)
            # Reserved: a page of a sparse file that finds the disk full kills the process without a word.
            with disk_errors(path), open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
            maps[tap_name(t, tap.name)] = np.memmap(path, np.float16, "r+", shape=shape)
    with track("fit features", fit_draws * len(good)) as progress:
        for draw in range(fit_draws):
            for start in range(0, len(good), spec.batch_size):
                batch = good[start : start + spec.batch_size]
                flips = [job.flips[row % len(job.flips)] for row in batch]
                averaged = job.draws if job.average else 1
                numbers = range(draw * averaged, (draw + 1) * averaged)
                inputs = [
                    job.input(loaded[r], r, flip, numbers)
                    for r, flip in zip(batch, flips, strict=True)
                ]
                draws = list(job.teacher.features(job.teacher.batch(inputs)))
                for name in draws[0]:
                    mean_BCHW = torch.stack([whiten(raw[name])[0] for raw in draws]).mean(0)
                    maps[name][draw, start : start + len(batch)] = mean_BCHW.half().cpu().numpy()
                progress.advance(len(batch))
    for name, array in maps.items():
        if not np.isfinite(array).all():
            raise CodecError(f"the teacher's output is not finite at {name}; try --precision fp32")
    return maps


def bytes_per_view(
    fit: Mapping[str, FittedTap],
    statistics: Mapping[str, TapStatistics],
    target: float,
    images: int,
    views: int,
    row_bytes: float = ROW_BYTES,
    sized: int = SIZED_VIEWS,
) -> float:
    """Return all stored bytes a view but images: chunks and index entries as written, and a share of the rest.

    `row_bytes` is what a row costs beside its views; chunks are those of the first `sized` views of the fit.

    The fit's own bytes count for at most half the target: a cache of few images cannot pay for them.
    """
    chunks = 0.0
    for name, fitted in fit.items():
        coder = fitted.payload_coder()
        live = fitted.live
        bound = fitted.payload_bound
        kept = statistics[name].coefficients[0, :sized]
        flat = torch.from_numpy(kept.reshape(len(kept), -1)[:, live])
        step = torch.from_numpy(fitted.class_step[fitted.live_classes])
        values = quantise(flat, step).numpy().astype(np.int16)
        payloads = [coder.pack(v, 0.01, 1.01) for v in values]
        packed = sum(len(pack_frame(p, bound)) for p in payloads)
        chunks += packed / len(kept) + CRC_BYTES + ENTRY_BYTES
    arrays = [array for fitted in fit.values() for array in fitted.arrays().values()]
    side = sum(len(compress(np.ascontiguousarray(a).tobytes(), ZSTD_LEVEL)) + 900 for a in arrays)
    return chunks + min((side / images + row_bytes) / views, target / 2)
