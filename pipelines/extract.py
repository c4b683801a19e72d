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

import torch

from dtcache._version import __version__
from dtcache.device import cpu_threads
from dtcache.errors import CacheMismatchError, ConfigError, ExtractionError
from dtcache.images import open_source
from dtcache.images.stored import image_bound
from dtcache.options import ExtractOptions, parse_share
from dtcache.spec import CodecSpec, FailedSample, Json
from dtcache.storage import FolderLock
from dtcache.store.layout import MANIFEST, payload_arrays
from dtcache.store.manifest import read_manifest
from dtcache.store.writer import CacheWriter, require_ours
from dtcache.teacher import CallableTeacher
from pipelines.equivariance import measure
from pipelines.fit import fit_codec
from pipelines.job import Job, make_job
from pipelines.progress import track
from pipelines.recipe import asked, fit_rows, recipe_of, require_same_job, stored_prompt, target_ratio
from pipelines.runner import make_runner
from pipelines.worker import connected, on_workers, require_one_cluster

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


def extract(images: Path, out: Path, options: ExtractOptions, teacher: CallableTeacher | None = None) -> Extracted:
    """Cache a teacher's features of `images` in `out`; goes on with a cache that was begun with the same recipe.

    `teacher` is one made in Python, in place of the one that the options name.

    Raises CacheMismatchError naming the field where `out` holds another cache, and what its parts raise.
    """
    started = time.time()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: expected a folder, got a file")
    most = parse_share(options.max_failures, "--max-failures")
    require_one_cluster(options, teacher is None)
    source = open_source(images, track)
    stored = stored_prompt(out, read_manifest(out)) if (out / MANIFEST).exists() else None
    job = make_job(source, options, teacher, stored)
    if out.is_dir() and not (out / MANIFEST).exists():
        require_ours(out)
    with FolderLock(out), connected(out, job, options) as client:
        begun = read_manifest(out).recipe if (out / MANIFEST).exists() else None
        options = replace(options, threads=_threads(job, options, begun))
        with cpu_threads(options.threads):
            if begun is not None:
                require_same_job(out, begun, asked(job, options), job)
                writer = CacheWriter.resume(out)
                _require_same_images(job, writer)
            else:
                writer = _begin(out, job, options)
            count, missing = len(job.samples), writer.missing
            array = next(iter(writer.manifest.arrays.values()))
            left, written = sum(len(array.rows_of(shard)) for shard in missing), 0
            with track("extract", count, count - left) as progress:

                def on_rows(done: int) -> None:
                    progress.advance(done, f"{written / 2**20:.1f} MiB written, {len(writer.failures)} failed")

                if client is None:
                    shards = make_runner(out, writer.manifest, job, options).write(missing, on_rows)
                else:
                    del job  # its teacher makes room on the device for a worker's
                    shards = on_workers(client, images, writer, options, on_rows)
                with closing(shards):
                    for made in shards:
                        require_few_failures([*writer.failures, *made.record.failures], count, most)
                        written += writer.commit(made)
            writer.seal()
            failures = tuple(writer.failures)
            if missing:
                _write_log(writer, started, left, options)
    return Extracted(root=out, num_done=count - len(failures), failures=failures, seconds=time.time() - started)


def _threads(job: Job, options: ExtractOptions, begun: Json | None) -> int | None:
    """Return the CPU threads of each process that computes: the recipe's where there is one; None on a GPU."""
    if job.teacher.spec.device_type != "cpu":
        return None
    if options.threads is not None or begun is not None:
        return options.threads or (begun or {}).get("threads")
    return 1 if options.scheduler else max(1, torch.get_num_threads() // (options.workers or 1))


def _write_log(writer: CacheWriter, started: float, rows: int, options: ExtractOptions) -> None:
    writer.write_log(
        {"seconds": time.time() - started, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
         "rows_this_run": rows, "dtcache": __version__, "torch": torch.__version__, "host": platform.node(),
         "python": platform.python_version(), "threads": torch.get_num_threads(), "workers": options.workers}
    )  # fmt: skip


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
    fitted = fit_codec(out, job, fit_rows(count), target_ratio(job, options))
    _warn_of_bias(fitted.spec)
    measured = measure(job, fit_rows(count))
    for timestep, error in (measured.round_trip or {}).items():
        print(f"{timestep}: images inverted and denoised back are off by {error:.1e} of their square", file=sys.stderr)
    bytes_a_row = fitted.bytes_per_view * job.views + job.view.height * job.view.width * 2 * job.stores_images
    options = replace(options, shard_rows=options.shard_rows or _shard_rows(count, bytes_a_row))
    recipe = recipe_of(job, fitted.spec, options, measured)
    bounds = {name: tap.payload_bound for name, tap in fitted.fit.items()}
    arrays = payload_arrays(recipe, image_bound(job.view), bounds)
    fit = {name: tap.arrays() for name, tap in fitted.fit.items()}
    embedding_LD = job.teacher.prompt.embedding_LD if job.teacher.prompt is not None else None
    return CacheWriter.create(out, recipe, arrays, fit, job.samples, job.source.classes, embedding_LD)


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
    hashes = ((row, writer.content_sha256(row)) for row in range(0, count, max(1, count // CHECKED_ROWS)))
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
