"""The writer of a cache: resumed, or begun by fitting the codec and measuring the teacher."""

import hashlib
from pathlib import Path

from dtcache.codec import sections_of
from dtcache.errors import CacheBusyError, CacheMismatchError
from dtcache.images.stored_images import image_bound
from dtcache.recipe import CodecSpec
from dtcache.store.layout import MANIFEST, payload_arrays
from dtcache.store.writer import CacheWriter
from pipelines.disk_space import require_space
from pipelines.extract.fit_codec import fit_codec, fit_rows
from pipelines.extract.measure_teacher import measure
from pipelines.extract.plan import ExtractionPlan
from pipelines.size_estimate import mean_image_bytes
from pipelines.terminal.output import say

CHECKED_ROWS = 64
BAD_ERROR = 0.5
"""A warning names each tap that loses more than this share of the variance set by the image."""


def open_writer(out: Path, plan: ExtractionPlan) -> CacheWriter:
    """Return the writer of the cache in `out`; the caller holds the lock of `out`.

    Raises CacheBusyError if another process began or replaced the cache since the plan was made,
    CacheMismatchError if images have changed since the cache was begun, and what fitting, measuring
    and writing raise.
    """
    if plan.begun is None:
        if (out / MANIFEST).exists():
            raise _changed(out)
        return begin_cache(out, plan)
    writer = CacheWriter.resume(out)
    if writer.manifest.fingerprint != plan.begun.manifest.fingerprint:
        raise _changed(out)
    _require_same_images(plan, writer)
    return writer


def begin_cache(out: Path, plan: ExtractionPlan) -> CacheWriter:
    """Fit the codec, measure the teacher, and write an empty cache with the resulting recipe."""
    options = plan.options
    count = len(plan.samples)
    if not options.skip_disk_check:
        # A first check, before the minutes of the fit, with the smallest size that is possible.
        require_space(out, count * plan.fp16_bytes_per_image / (plan.ratio or 2))
    fitted = fit_codec(out, plan, fit_rows(count))
    _warn_of_bias(fitted.spec)
    measured = measure(plan, fit_rows(count))
    for timestep, error in (measured.round_trip or {}).items():
        say(
            f"{timestep}: images inverted and denoised back have a relative squared error of "
            f"{error:.1e}"
        )
    bytes_per_row = fitted.bytes_per_view * plan.num_views + image_bytes(plan)
    if not options.skip_disk_check:
        require_space(out, count * bytes_per_row)
    recipe = plan.recipe(
        fitted.spec,
        options.shard_rows or choose_shard_rows(count, bytes_per_row),
        measured.equivariance,
        measured.round_trip,
    )
    bounds = {array: sections.bound for array, sections in sections_of(fitted.fit).items()}
    prompt = plan.teacher.prompt
    return CacheWriter.create(
        out,
        recipe,
        payload_arrays(recipe, image_bound(plan.view), bounds),
        {name: tap.arrays() for name, tap in fitted.fit.items()},
        plan.samples,
        plan.source.classes,
        prompt.embedding_LD if prompt is not None else None,
    )


def image_bytes(plan: ExtractionPlan) -> float:
    """Return the mean bytes of a stored image, estimated from a few images; 0 if none is stored."""
    if not plan.options.store_images:
        return 0.0
    return mean_image_bytes(plan.source, plan.samples, plan.view)


def choose_shard_rows(count: int, bytes_per_row: float) -> int:
    """Return the largest power of two that keeps a shard below 64 MB and gives 64 shards or more.

    It lies in [256, 4096], or below 256 if 256 rows take more than 512 MB, as large float16
    features do: a shard is built in memory.
    """
    most = max(min(64e6 / bytes_per_row, count / 64, 4096), min(256, 512e6 / bytes_per_row))
    return 1 << max(0, int(most).bit_length() - 1)


def _warn_of_bias(spec: CodecSpec) -> None:
    """Warn of taps whose codec loses much of the variance that a student could learn."""
    for name, error in spec.determined_error.items():
        if error > BAD_ERROR:
            say(
                f"warning: {name}: at this size the codec loses {error:.0%} of what the image "
                "determines; pass a higher quality or more bytes per image, or leave the tap out"
            )


def _changed(out: Path) -> CacheBusyError:
    return CacheBusyError(
        f"{out}: another process began a cache there meanwhile; run the same command again"
    )


def _require_same_images(plan: ExtractionPlan, writer: CacheWriter) -> None:
    """Compare the image bytes of some committed rows with the source.

    Raises CacheMismatchError naming the first image whose bytes changed.
    """
    count = len(plan.samples)
    committed = {
        row: writer.content_sha256(row) for row in range(0, count, max(1, count // CHECKED_ROWS))
    }
    recorded = {row: sha256 for row, sha256 in committed.items() if sha256 is not None}
    fetches = plan.source.fetches(plan.samples[row].index for row in recorded)
    for (row, sha256), (_, fetch) in zip(recorded.items(), fetches, strict=True):
        try:
            same = hashlib.sha256(fetch()).hexdigest() == sha256
        except OSError:
            same = False
        if not same:
            raise CacheMismatchError(
                f"{writer.root} was made from another image {plan.samples[row].key}: its bytes "
                "have changed since; pass the images that the cache was begun with, or another "
                "`out`"
            )
