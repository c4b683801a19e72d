"""`dtcache extract --dry-run`: the cost of an extraction, extrapolated from two batches."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from dtcache.codec import FeatureEncoder
from dtcache.device_memory import peak_bytes
from dtcache.images import load_views
from dtcache.options import ExtractOptions
from dtcache.process_settings import cpu_threads
from dtcache.teacher import CallableTeacher, Teacher
from dtcache.teacher.flops import count_flops
from pipelines.disk_space import RESERVE, free_bytes
from pipelines.extract.fit_codec import CodecFit, fit_codec, fit_draws, fit_rows
from pipelines.extract.plan import ExtractionPlan, plan_extraction
from pipelines.extract.shard import PackedRow, packed_rows
from pipelines.extract.shard_runner import decode_threads
from pipelines.terminal.progress import track
from pipelines.terminal.text import byte_size, duration


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """The expected cost of an extraction on this machine, in one process."""

    images: int
    views: int
    """Views per image."""
    batch_size: int
    """Views per pass of the teacher."""
    views_per_second: float
    """Speed of computing shards, without the fit of the codec."""
    teacher_share: float
    """Share of the shards' time that the teacher's passes take."""
    fit_seconds: float
    seconds: float
    """Time of the whole extraction, including the fit."""
    feature_bytes: float
    """Bytes of the features, the codec's fit and the indices."""
    image_bytes: float
    """Bytes of the stored images."""
    spool_bytes: int
    """Temporary bytes on the same disk while the codec is fitted."""
    free_bytes: int
    memory_bytes: int
    """Peak memory of this process so far; on a GPU, its peak allocated memory."""
    flops: int | None
    """FLOPs per view of one truncated pass; a multiply-add counts as two. The further passes of an
    inversion and an autoencoder are not counted. None if the operations cannot be counted."""
    full_flops: int | None
    """FLOPs per view of one full pass; None if the operations cannot be counted."""
    payback_epochs: float
    """Epochs of training, summed over all students, after which the cache has cost less than a
    teacher in the training loop."""

    @property
    def fits(self) -> bool:
        """Whether the disk has room for the cache and the temporary files of the fit."""
        return (
            self.free_bytes > RESERVE * (self.feature_bytes + self.image_bytes) + self.spool_bytes
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    """The rows of two batches of an extraction, and the time that they took."""

    packed: list[PackedRow]
    seconds: float
    teacher_seconds: float


def forecast(
    images: Path, out: Path, options: ExtractOptions, teacher: CallableTeacher | None = None
) -> Forecast:
    """Fit the codec on two batches, run these, and extrapolate; write nothing to `out`.

    If `out` holds a begun cache, the forecast is of the whole cache. Raises what `extract` raises
    before it computes.
    """
    plan = plan_extraction(images, out, options, teacher)
    count = len(plan.samples)
    spec = plan.teacher.spec
    rows = min(count, 2 * max(1, spec.batch_size // len(plan.flips)))
    clock = plan.teacher.clock
    with (
        cpu_threads(plan.options.threads),
        tempfile.TemporaryDirectory(prefix="dtcache-") as scratch,
    ):
        started = time.monotonic()
        teacher_before = clock.seconds
        fitted = fit_codec(Path(scratch), plan, rows)
        solve_seconds = time.monotonic() - started - (clock.seconds - teacher_before)
        trial = _run_rows(plan, fitted, rows)
    passes_per_row = len(plan.flips) * plan.options.draws
    pass_seconds = trial.teacher_seconds / (rows * passes_per_row)
    stored = sum(len(row.image) for row in trial.packed) / max(
        1, sum(row.reason is None for row in trial.packed)
    )
    averaged = plan.options.draws if plan.options.average else 1
    draws = fit_draws(plan)
    # Besides the passes, the fit spends most of its time on statistics, and this time grows with
    # the rows. Solving for the step takes less time, which does not grow.
    fit_seconds = (draws * averaged * fit_rows(count)) * pass_seconds
    fit_seconds += solve_seconds * fit_rows(count) / rows
    seconds = fit_seconds + count * trial.seconds / rows
    return Forecast(
        images=count,
        views=plan.num_views,
        batch_size=spec.batch_size,
        views_per_second=rows * passes_per_row / trial.seconds,
        teacher_share=trial.teacher_seconds / trial.seconds,
        fit_seconds=fit_seconds,
        seconds=seconds,
        feature_bytes=count * plan.num_views * fitted.bytes_per_view,
        image_bytes=count * stored,
        spool_bytes=2 * draws * fit_rows(count) * plan.values_per_view,
        free_bytes=free_bytes(out),
        memory_bytes=peak_bytes(plan.teacher.device),
        flops=_flops(plan.teacher, plan.teacher.network),
        full_flops=_flops(plan.teacher, None),
        payback_epochs=seconds / (count * pass_seconds),
    )


def _run_rows(plan: ExtractionPlan, fitted: CodecFit, rows: int) -> _Trial:
    """Compute the first rows as an extraction does, and measure the time."""
    device = plan.teacher.device
    encoder = FeatureEncoder(fitted.fit, device)
    indices = [plan.samples[row].index for row in range(rows)]
    views = load_views(plan.source, indices, plan.view, threads=decode_threads(device))
    with track("two batches", rows) as progress:
        started = time.monotonic()
        teacher_before = plan.teacher.clock.seconds
        packed = list(packed_rows(plan, encoder, range(rows), views, progress.advance))
        return _Trial(
            packed=packed,
            seconds=time.monotonic() - started,
            teacher_seconds=plan.teacher.clock.seconds - teacher_before,
        )


def render_forecast(forecast: Forecast) -> Table:
    """Return the forecast as a narrow table."""
    title = f"{forecast.images} images, {forecast.views} views each; in one process"
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_row(
        "time",
        f"{duration(forecast.seconds)}, codec fit {duration(forecast.fit_seconds)} of it",
    )
    table.add_row(
        "speed",
        f"{forecast.views_per_second:.1f} views/s, teacher busy {forecast.teacher_share:.0%}",
    )
    table.add_row(
        "cache",
        f"{byte_size(forecast.feature_bytes + forecast.image_bytes)}: features "
        f"{byte_size(forecast.feature_bytes)}, images {byte_size(forecast.image_bytes)}",
    )
    table.add_row(
        "disk",
        f"{byte_size(forecast.free_bytes)} free, {'fits' if forecast.fits else 'DOES NOT FIT'}; "
        f"{byte_size(forecast.spool_bytes)} more during the fit",
    )
    table.add_row(
        "memory", f"{byte_size(forecast.memory_bytes)} with {forecast.batch_size} views per pass"
    )
    if forecast.flops is not None:
        share = (
            f", {forecast.flops / forecast.full_flops:.0%} of a full pass"
            if forecast.full_flops
            else ""
        )
        table.add_row("teacher", f"{forecast.flops / 1e9:.3g} GFLOP per view{share}")
    table.add_row(
        "pays off", f"after {forecast.payback_epochs:.1f} epochs, summed over all students"
    )
    return table


def _flops(teacher: Teacher, network: torch.nn.Module | None) -> int | None:
    """Count the operations of a pass of `network`, by default the full denoiser."""
    try:
        if network is None:
            network = teacher.denoiser.predictor()
        return count_flops(network, teacher.input_shape, teacher.denoiser.num_classes) or None
    except Exception:  # a user's module may fail in any way on tensors without data
        return None
