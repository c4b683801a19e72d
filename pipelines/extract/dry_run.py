"""What an extraction will take, from two of its batches: `dtcache extract --dry-run`, and the check of the disk."""

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from dtcache.codec import FeatureEncoder
from dtcache.device import cpu_threads
from dtcache.images import load_views
from dtcache.options import ExtractOptions
from dtcache.teacher import CallableTeacher, Teacher
from dtcache.teacher.flops import count_flops
from pipelines.extract.extract import prepare
from pipelines.extract.fit_codec import DRAWS, fit_codec
from pipelines.extract.recipe_options import fit_rows, target_ratio
from pipelines.extract.shard import packed_rows
from pipelines.extract.shard_runner import decode_threads
from pipelines.size_estimate import RESERVE, free_bytes
from pipelines.terminal.progress import track
from pipelines.terminal.text import byte_size, duration


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
    flops: int | None
    """Of a truncated pass, a view; a multiply-add is two. An inversion's passes and an autoencoder come on top."""
    full_flops: int | None
    """Of a whole one; None where nothing is known of it."""
    payback_epochs: float
    """Epochs after which students that read the cache have cost less than those with the teacher in their loop."""


def forecast(
    images: Path, out: Path, options: ExtractOptions, teacher: CallableTeacher | None = None
) -> Forecast:
    """Load everything, fit the codec on two batches, run them, and extrapolate; writes nothing to `out`.

    A cache that is begun already is forecast as a whole. Raises what an extraction's beginning raises.
    """
    options, job = prepare(images, out, options, teacher)
    count = len(job.samples)
    passes = DRAWS if job.teacher.is_random else 1
    rows = min(count, 2 * max(1, job.teacher.spec.batch_size // len(job.flips)))
    clock = job.teacher.clock
    device = job.teacher.device
    with cpu_threads(options.threads), tempfile.TemporaryDirectory(prefix="dtcache-") as scratch:
        started = time.monotonic()
        before = clock.seconds
        fitted = fit_codec(Path(scratch), job, rows, target_ratio(job, options))
        solving = time.monotonic() - started - (clock.seconds - before)
        encoder = FeatureEncoder(fitted.fit, device)
        places = [job.samples[row].index for row in range(rows)]
        views = load_views(job.source, places, job.view, threads=decode_threads(device))
        with track("two batches", rows) as progress:
            started = time.monotonic()
            before = clock.seconds
            packed = list(packed_rows(job, encoder, range(rows), views, progress.advance))
            taken = time.monotonic() - started
    teaching = clock.seconds - before
    passes_a_row = len(job.flips) * job.draws
    a_pass = teaching / (rows * passes_a_row)
    stored = sum(len(row.image) for row in packed) / max(
        1, sum(row.reason is None for row in packed)
    )
    averaged = job.draws if job.average else 1
    # The statistics, most of what is not passes, grow with the rows; solving the step does not, and is the smaller.
    real_fit = (passes * averaged * fit_rows(count)) * a_pass + solving * fit_rows(count) / rows
    seconds = real_fit + count * taken / rows
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
        free_bytes=free_bytes(out),
        memory_bytes=_peak_bytes(device),
        flops=_flops(job.teacher, whole=False),
        full_flops=_flops(job.teacher, whole=True),
        payback_epochs=seconds / (count * a_pass),
    )


def render_forecast(found: Forecast) -> Table:
    """Return the forecast as a narrow table."""
    title = f"{found.images} images, {found.views} views each; in one process"
    table = Table(show_header=False, title=title, title_justify="left")
    total = found.feature_bytes + found.image_bytes
    fits = "fits" if found.free_bytes > RESERVE * total + found.spool_bytes else "DOES NOT FIT"
    table.add_row(
        "time", f"{duration(found.seconds)}, codec fit {duration(found.fit_seconds)} of it"
    )
    table.add_row(
        "speed", f"{found.views_per_second:.1f} views/s, teacher busy {found.teacher_share:.0%}"
    )
    table.add_row(
        "cache",
        f"{byte_size(total)}: features {byte_size(found.feature_bytes)}, images {byte_size(found.image_bytes)}",
    )
    table.add_row(
        "disk",
        f"{byte_size(found.free_bytes)} free, {fits}; {byte_size(found.spool_bytes)} more during the fit",
    )
    table.add_row("memory", f"{byte_size(found.memory_bytes)} with {found.batch_size} views a pass")
    if found.flops is not None:
        whole = (
            f", {found.flops / found.full_flops:.0%} of a whole pass" if found.full_flops else ""
        )
        table.add_row("teacher", f"{found.flops / 1e9:.3g} GFLOP a view{whole}")
    table.add_row(
        "pays off", f"after {found.payback_epochs:.1f} epochs of students, counted together"
    )
    return table


def _flops(teacher: Teacher, *, whole: bool) -> int | None:
    try:
        network = teacher.denoiser.predictor() if whole else teacher.network
        return count_flops(network, teacher.input_shape, teacher.denoiser.num_classes) or None
    except Exception:  # a module of one's own may do anything on tensors that hold no numbers
        return None


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
