"""Stage 1: images and a teacher to a sealed cache, one shard after the other."""

import hashlib
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dtcache._version import __version__
from dtcache.atomic_files import FolderLock
from dtcache.device import cpu_threads
from dtcache.errors import CacheMismatchError, ConfigError, ExtractionError
from dtcache.images import open_source
from dtcache.images.stored_images import image_bound
from dtcache.options import ExtractOptions, parse_share
from dtcache.recipe import CodecSpec, FailedSample, Json
from dtcache.store.layout import MANIFEST, payload_arrays
from dtcache.store.manifest import read_manifest
from dtcache.store.pending_shard import WrittenShard
from dtcache.store.writer import CacheWriter, require_ours
from dtcache.teacher import CallableTeacher
from pipelines.extract.equivariance import measure
from pipelines.extract.fit_codec import fit_codec
from pipelines.extract.plan import Job, computing_threads, make_job
from pipelines.extract.recipe_options import (
    asked,
    fit_rows,
    recipe_of,
    require_same_job,
    stored_prompt,
    target_ratio,
)
from pipelines.extract.shard_runner import ShardRunner, make_runner
from pipelines.extract.workers.worker import connected, on_workers, require_one_cluster
from pipelines.size_estimate import image_bytes, require_space
from pipelines.terminal.progress import track

if TYPE_CHECKING:
    from dask.distributed import Client

CHECKED_ROWS = 64
BAD_ERROR = 0.5
"""Of the variance that the image determines: a tap that loses more of it is warned of."""
LEAST_FAILURES = 10
"""Fewer failed images never stop an extraction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extracted:
    """What came of an extraction."""

    root: Path
    num_done: int
    failures: tuple[FailedSample, ...]
    seconds: float
    fit_seconds: float
    """Of this run: codec fit and what is measured of the teacher, passes included; 0 where a cache was resumed."""
    shard_seconds: float
    """Of this run, from the first shard's begin to the last one's commit."""


def extract(
    images: Path, out: Path, options: ExtractOptions, teacher: CallableTeacher | None = None
) -> Extracted:
    """Cache a teacher's features of `images` in `out`; goes on with a cache that was begun with the same recipe.

    `teacher` is one made in Python, in place of the one that the options name.

    Raises CacheMismatchError naming the field where `out` holds another cache, and what its parts raise.
    """
    started = time.time()
    options, job = prepare(images, out, options, teacher)
    with FolderLock(out), connected(out, job, options) as client:
        begun = read_manifest(out).recipe if (out / MANIFEST).exists() else None
        opened = time.time()
        with cpu_threads(options.threads):
            if begun is not None:
                require_same_job(out, begun, asked(job, options), job)
                writer = CacheWriter.resume(out)
                _require_same_images(job, writer)
            else:
                writer = _begin(out, job, options)
            fitted = time.time()
            left = rows_left(writer)
            count = len(job.samples)
            where = make_runner(out, writer.manifest, job, options) if client is None else client
            del job  # its teacher makes room on the device for a local worker's
            _compute(images, writer, where, options)
            computed = time.time()
            writer.seal()
            failures = tuple(writer.failures)
            done = Extracted(
                root=out,
                num_done=count - len(failures),
                failures=failures,
                seconds=time.time() - started,
                fit_seconds=fitted - opened if begun is None else 0.0,
                shard_seconds=computed - fitted,
            )
            if left:
                _write_log(writer, done, left, options)
    return done


def prepare(
    images: Path, out: Path, options: ExtractOptions, teacher: CallableTeacher | None = None
) -> tuple[ExtractOptions, Job]:
    """Check what can be checked before anything is computed, and load images and teacher.

    Returns the options with batch size and threads as the recipe of a begun cache has them. Raises CacheMismatchError
    where `out` holds another cache or other people's files, and what loading raises.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: expected a folder, got a file")
    parse_share(options.max_failures, "max_failures")
    require_one_cluster(options, teacher is None)
    manifest = read_manifest(out) if (out / MANIFEST).exists() else None
    if manifest is None and out.is_dir():
        require_ours(out)
    source = open_source(images, track)
    stored = None
    if manifest is not None:
        stored = stored_prompt(out, manifest)
        # auto is chosen once
        options = replace(
            options, batch_size=options.batch_size or manifest.recipe["teacher"]["batch_size"]
        )
    job = make_job(source, options, teacher, stored)
    options = replace(
        options, threads=_threads(job, options, manifest.recipe if manifest is not None else None)
    )
    if manifest is not None:
        require_same_job(out, manifest.recipe, asked(job, options), job)
    return options, job


def rows_left(writer: CacheWriter) -> int:
    """Return how many rows are not committed."""
    return sum(len(writer.manifest.rows_of(shard)) for shard in writer.missing)


def _compute(
    images: Path, writer: CacheWriter, where: "ShardRunner | Client", options: ExtractOptions
) -> None:
    """Compute and commit the missing shards, here or on workers, and show how they come on."""
    count = writer.manifest.num_samples
    left = rows_left(writer)
    missing = writer.missing
    most = parse_share(options.max_failures, "max_failures")
    failed = list(writer.failures)
    written = [0]
    clock = where.job.teacher.clock if isinstance(where, ShardRunner) else None
    started = time.time()
    before = clock.seconds if clock else 0.0
    with track("extract", count, count - left) as progress:

        def on_rows(done: int) -> None:
            busy = (clock.seconds - before) / max(time.time() - started, 1e-9) if clock else 0.0
            share = f"teacher busy {busy:.0%}, " if clock else ""
            progress.advance(
                done, f"{share}{sum(written) / 2**20:.1f} MiB written, {len(failed)} failed"
            )

        def commit(made: WrittenShard) -> None:
            failed.extend(made.record.failures)
            require_few_failures(failed, count, most)
            written.append(writer.commit(made))

        if isinstance(where, ShardRunner):
            shards = where.write(missing, on_rows, commit)
        else:
            shards = on_workers(where, images, writer, options, on_rows, commit)
        with closing(shards):
            for _ in shards:
                pass


def _threads(job: Job, options: ExtractOptions, begun: Json | None) -> int | None:
    """Return the CPU threads of each process that computes: the recipe's where there is one; None on a GPU."""
    if job.teacher.spec.device_type != "cpu":
        return None
    if options.threads is not None or begun is not None:
        return options.threads or (begun or {}).get("threads")
    return computing_threads(options)


def _write_log(writer: CacheWriter, done: Extracted, rows: int, options: ExtractOptions) -> None:
    writer.write_log(
        {
            "seconds": done.seconds,
            "fit_seconds": done.fit_seconds,
            "shard_seconds": done.shard_seconds,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows_this_run": rows,
            "dtcache": __version__,
            "torch": torch.__version__,
            "host": platform.node(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "workers": options.workers,
        }
    )


def require_few_failures(failures: Sequence[FailedSample], count: int, most: float) -> None:
    """Raise ExtractionError where more than the share `most` of `count` images, and ten or more, have failed.

    It comes before the shard that exceeds it is committed: where a disk was unmounted, a resume tries it again.
    """
    if len(failures) < LEAST_FAILURES or len(failures) <= most * count:
        return
    first = {failed.reason: failed.key for failed in reversed(failures)}
    reasons = Counter(failed.reason for failed in failures).most_common(3)
    some = "; ".join(f"{times} x {reason} (first {first[reason]})" for reason, times in reasons)
    raise ExtractionError(
        f"{len(failures)} of {count} images failed, --max-failures allows {most:.4%}: {some}. What is committed stays: "
        "see that the images can be read and run the same command again to resume, or allow more"
    )


def _begin(out: Path, job: Job, options: ExtractOptions) -> CacheWriter:
    """Fit the codec and measure the teacher, once, and lay out the cache that this fixes."""
    count = len(job.samples)
    ratio = target_ratio(job, options)
    if not options.force:
        # The least that it can be, before the fit's minutes; then, with images, what it will be.
        fp16 = (
            2
            * job.views
            * sum(tap.values for tap in job.teacher.spec.taps)
            * len(job.teacher.spec.timesteps)
        )
        require_space(out, count * fp16 / (ratio or 2))
    fitted = fit_codec(out, job, fit_rows(count), ratio)
    _warn_of_bias(fitted.spec)
    measured = measure(job, fit_rows(count))
    for timestep, error in (measured.round_trip or {}).items():
        print(
            f"{timestep}: images inverted and denoised back are off by {error:.1e} of their square",
            file=sys.stderr,
        )
    bytes_a_row = fitted.bytes_per_view * job.views + image_bytes(job)
    if not options.force:
        require_space(out, count * bytes_a_row)
    options = replace(options, shard_rows=options.shard_rows or _shard_rows(count, bytes_a_row))
    recipe = recipe_of(job, fitted.spec, options, measured)
    bounds = {name: tap.payload_bound for name, tap in fitted.fit.items()}
    arrays = payload_arrays(recipe, image_bound(job.view), bounds)
    fit = {name: tap.arrays() for name, tap in fitted.fit.items()}
    embedding_LD = job.teacher.prompt.embedding_LD if job.teacher.prompt is not None else None
    return CacheWriter.create(
        out, recipe, arrays, fit, job.samples, job.source.classes, embedding_LD
    )


def _warn_of_bias(spec: CodecSpec) -> None:
    """Say where the codec distorts what a student could learn; it costs bytes to mend, so that the user decides."""
    for name, error in spec.determined_error.items():
        if error > BAD_ERROR:
            print(
                f"warning: {name}: {error:.0%} of what the image determines is lost at this size; raise --quality or "
                "--bytes-per-image, or leave the tap out with --taps",
                file=sys.stderr,
            )


def _shard_rows(count: int, bytes_a_row: float) -> int:
    """Return the largest power of two that keeps a shard under 64 MB and the cache at 64 shards, in [256, 4096].

    Fewer where even 256 rows take over 512 MB, as large float16 features do: a shard is built in memory.
    """
    most = max(min(64e6 / bytes_a_row, count / 64, 4096), min(256, 512e6 / bytes_a_row))
    return 1 << max(0, int(most).bit_length() - 1)


def _require_same_images(job: Job, writer: CacheWriter) -> None:
    """Compare some committed rows' image bytes with the source. Raises CacheMismatchError naming one that changed."""
    count = len(job.samples)
    hashes = (
        (row, writer.content_sha256(row)) for row in range(0, count, max(1, count // CHECKED_ROWS))
    )
    known = [(row, sha256) for row, sha256 in hashes if sha256 is not None]
    fetches = job.source.fetches(job.samples[row].index for row, _ in known)
    for (row, sha256), (_, fetch) in zip(known, fetches, strict=True):
        try:
            same = hashlib.sha256(fetch()).hexdigest() == sha256
        except OSError:
            same = False
        if not same:
            raise CacheMismatchError(
                f"{writer.root} was made from another image {job.samples[row].key}: its bytes have changed since; give "
                "the images that the cache was begun with, or another --out"
            )
