"""What an extraction will take, from two of its batches: `dtcache extract --dry-run`, and the check of the disk."""

import resource
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from dtcache.codec import FeatureEncoder
from dtcache.device import cpu_threads, resolve_compute
from dtcache.errors import ConfigError, DiskError
from dtcache.images import load_views, open_source
from dtcache.images.stored import encode_stored, image_bound
from dtcache.options import ExtractOptions
from dtcache.teacher import CallableTeacher, Teacher
from pipelines.fit import DRAWS, fit_codec
from pipelines.job import Job, make_job
from pipelines.progress import track
from pipelines.recipe import fit_rows, target_ratio
from pipelines.runner import DECODE_THREADS
from pipelines.shard import packed_rows
from pipelines.teacher import count_flops
from pipelines.words import byte_size, duration

SAMPLED_IMAGES = 16
RESERVE = 1.05
"""Shares of the forecast bytes that must be free: file systems and indices take some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What an extraction on this machine, in one process, is expected to take."""

    images: int
    views: int
    """Of an image."""
    batch_size: int
    """Views a pass."""
    views_per_second: float
    """Of the whole stage, once the codec is fitted."""
    teacher_share: float
    """Of that time, what the teacher's passes take."""
    fit_seconds: float
    seconds: float
    """All of it, the fit included."""
    feature_bytes: float
    """Features, the codec's fit and indices."""
    image_bytes: float
    spool_bytes: int
    """On the same disk, while the codec is fitted."""
    free_bytes: int
    memory_bytes: int
    """Most that this process has held, on a GPU most of its memory that was allocated."""
    flops: int
    """Of a truncated pass, a view; a multiply-add is two."""
    full_flops: int | None
    """Of a whole one; None where nothing is known of it."""
    payback_epochs: float
    """Epochs after which students that read the cache have cost less than those with the teacher in their loop."""


def forecast(images: Path, out: Path, options: ExtractOptions, teacher: CallableTeacher | None = None) -> Forecast:
    """Load everything, fit the codec on two batches, run them, and extrapolate; writes nothing to `out`.

    Raises what an extraction's beginning raises.
    """
    job = make_job(open_source(images, track), options, teacher)
    count, passes = len(job.samples), DRAWS if job.teacher.is_random else 1
    rows = min(count, 2 * max(1, job.teacher.spec.batch_size // len(job.flips)))
    clock = job.teacher.clock
    with cpu_threads(options.threads), tempfile.TemporaryDirectory(prefix="dtcache-") as scratch:
        started, before = time.monotonic(), clock.seconds
        fitted = fit_codec(Path(scratch), job, rows, target_ratio(job, options))
        fitting, fit_passes = time.monotonic() - started, clock.seconds - before
        device = resolve_compute(options.device, options.precision).device
        encoder = FeatureEncoder(fitted.fit, device)
        views = load_views(job.source, [job.samples[r].index for r in range(rows)], job.view, threads=DECODE_THREADS)
        with track("two batches", rows) as progress:
            started, before = time.monotonic(), clock.seconds
            packed = list(packed_rows(job, encoder, range(rows), views, progress.advance))
            taken = time.monotonic() - started
    teaching = clock.seconds - before
    stored = sum(len(row.image) for row in packed) / max(1, sum(row.reason is None for row in packed))
    real_fit = fit_rows(count) / rows * fit_passes + (fitting - fit_passes)
    seconds, passes_a_row = real_fit + count * taken / rows, len(job.flips) * job.draws
    spec = job.teacher.spec
    values = sum(tap.values for tap in spec.taps) * len(spec.timesteps)
    return Forecast(
        images=count,
        views=job.views,
        batch_size=spec.batch_size,
        views_per_second=rows * passes_a_row / taken,
        teacher_share=teaching / taken,
        fit_seconds=real_fit,
        seconds=seconds,
        feature_bytes=count * job.views * fitted.bytes_per_view,
        image_bytes=count * stored,
        spool_bytes=2 * passes * fit_rows(count) * values,
        free_bytes=shutil.disk_usage(_existing(out)).free,
        memory_bytes=_peak_bytes(device),
        flops=_flops(job.teacher, whole=False) or 0,
        full_flops=_flops(job.teacher, whole=True),
        payback_epochs=seconds / (count * teaching / (rows * passes_a_row)),
    )


def image_bytes(job: Job) -> float:
    """Return the mean bytes of a stored image, from a few that can be decoded; 0 where none are stored."""
    if not job.stores_images:
        return 0.0
    places = [job.samples[row].index for row in range(min(SAMPLED_IMAGES, len(job.samples)))]
    loaded = [view for view in load_views(job.source, places, job.view, threads=1) if view.pixels_CHW is not None]
    return sum(len(encode_stored(view, image_bound(job.view))) for view in loaded) / max(1, len(loaded))


def require_space(out: Path, needed: float) -> None:
    """Raise DiskError where the disk of `out` has less than `needed` bytes free."""
    free = shutil.disk_usage(_existing(out)).free
    if free < RESERVE * needed:
        raise DiskError(
            f"{out}: expected {byte_size(RESERVE * needed)} free for this cache, found {byte_size(free)}; free some "
            "space, choose another --out or a smaller --quality, or go on with --force"
        )


def render_forecast(found: Forecast) -> Table:
    """Return the forecast as a narrow table."""
    table = Table(show_header=False, title=f"{found.images} images, {found.views} views each", title_justify="left")
    total = found.feature_bytes + found.image_bytes
    fits = "fits" if found.free_bytes > RESERVE * total + found.spool_bytes else "DOES NOT FIT"
    table.add_row("time", f"{duration(found.seconds)}, codec fit {duration(found.fit_seconds)} of it")
    table.add_row("speed", f"{found.views_per_second:.1f} views/s, teacher busy {found.teacher_share:.0%}")
    table.add_row(
        "cache", f"{byte_size(total)}: features {byte_size(found.feature_bytes)}, images {byte_size(found.image_bytes)}"
    )
    table.add_row(
        "disk", f"{byte_size(found.free_bytes)} free, {fits}; {byte_size(found.spool_bytes)} more during the fit"
    )
    table.add_row("memory", f"{byte_size(found.memory_bytes)} with {found.batch_size} views a pass")
    whole = f", {found.flops / found.full_flops:.0%} of a whole pass" if found.full_flops else ""
    table.add_row("teacher", f"{found.flops / 1e9:.3g} GFLOP a view{whole}")
    table.add_row("pays off", f"after {found.payback_epochs:.1f} epochs of students, counted together")
    return table


def _flops(teacher: Teacher, *, whole: bool) -> int | None:
    try:
        network = teacher.denoiser.predictor() if whole else teacher.network
        return count_flops(network, teacher.input_shape, teacher.denoiser.num_classes)
    except (ConfigError, NotImplementedError, TypeError):  # a module of one's own, which may do anything
        return None


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
