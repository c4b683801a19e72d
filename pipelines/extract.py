"""Stage 1: images and a teacher to a sealed cache, one shard after the other."""

import hashlib
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dtcache._version import __version__
from dtcache.cache import load_fit
from dtcache.codec import FeatureEncoder
from dtcache.device import resolve_compute
from dtcache.errors import CacheMismatchError, ConfigError, ExtractionError
from dtcache.images import load_views, open_source
from dtcache.images.stored import image_bound
from dtcache.options import QUALITY_RATIOS, ExtractOptions, parse_share
from dtcache.spec import CodecSpec, FailedSample, Json, Recipe
from dtcache.storage import FolderLock
from dtcache.store.layout import MANIFEST, SAMPLES, payload_arrays
from dtcache.store.manifest import read_manifest, require_same
from dtcache.store.samples import changed_samples, hash_samples, read_table
from dtcache.store.writer import CacheWriter, require_ours
from dtcache.teacher import CallableTeacher
from pipelines.equivariance import Measured, measure
from pipelines.fit import fit_codec
from pipelines.job import Job, make_job
from pipelines.progress import track
from pipelines.recipe import stored_prompt
from pipelines.shard import run_shard

DECODE_THREADS = 2
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
    source = open_source(images, track)
    stored = stored_prompt(out, read_manifest(out)) if (out / MANIFEST).exists() else None
    job = make_job(source, options, teacher, stored)
    if out.is_dir() and not (out / MANIFEST).exists():
        require_ours(out)
    with FolderLock(out):
        if (out / MANIFEST).exists():
            require_same_job(out, read_manifest(out).recipe, asked(job, options), job)
            writer = CacheWriter.resume(out)
            _require_same_images(job, writer)
        else:
            writer = _begin(out, job, options)
        count = len(job.samples)
        fit = load_fit(out, writer.manifest)
        encoder = FeatureEncoder(fit, resolve_compute(options.device, options.precision).device)
        missing = writer.missing
        array = next(iter(writer.manifest.arrays.values()))
        left = sum(len(array.rows_of(shard)) for shard in missing)
        written = 0
        with track("extract", count, count - left) as progress:
            todo = (job.samples[row].index for shard in missing for row in array.rows_of(shard))
            views = load_views(source, todo, job.view, threads=DECODE_THREADS)
            for shard in missing:
                note = f"{written / 2**20:.1f} MiB written, {len(writer.failures)} failed"
                work = run_shard(
                    job, encoder, shard, array.rows_of(shard), views, fit_rows(count),
                    lambda done, note=note: progress.advance(done, note),
                )  # fmt: skip
                require_few_failures([*writer.failures, *work.failures], count, most)
                written += writer.write_shard(work)
        writer.seal()
        failures = tuple(writer.failures)
        if missing:
            writer.write_log(
                {"seconds": time.time() - started, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                 "rows_this_run": left, "dtcache": __version__, "torch": torch.__version__, "host": platform.node(),
                 "python": platform.python_version(), "threads": torch.get_num_threads()}
            )  # fmt: skip
    return Extracted(root=out, num_done=count - len(failures), failures=failures, seconds=time.time() - started)


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


def fit_rows(count: int) -> int:
    """Return how many leading rows the codec is fitted on."""
    return min(256, count)


def target_ratio(job: Job, options: ExtractOptions) -> float | None:
    """Return how many times under fp16 the features shall lie, None to keep them float16. Raises ConfigError."""
    if options.bytes_per_image is None:
        return QUALITY_RATIOS[options.quality]
    fp16 = 2 * job.views * sum(tap.values for tap in job.teacher.spec.taps) * len(job.teacher.spec.timesteps)
    if options.quality != "default" or options.bytes_per_image >= fp16:
        raise ConfigError(
            f"--bytes-per-image {options.bytes_per_image:g}: expected fewer than the {fp16} bytes of float16, and no "
            f"--quality beside it; leave it out, or use --quality fp16 to store features as they are"
        )
    return fp16 / options.bytes_per_image


def asked(job: Job, options: ExtractOptions) -> Json:
    """Return the recipe's fields that options and inputs fix, to be compared with a cache that is there."""
    ratio = target_ratio(job, options)
    unfitted = CodecSpec(
        name="float16" if ratio is None else "pca-dct-rans", ratio=ratio, step=None,
        fit_rows=fit_rows(len(job.samples)), fit_sha256="", noise_share={}, noise_floor={}, determined_error={},
    )  # fmt: skip
    nothing = Measured(equivariance=None, round_trip=None)
    fixed = _recipe(job, unfitted, options.shard_rows or 0, nothing).to_json()
    # The rest of these is fitted, or follows from what is compared already.
    fixed["codec"] = {name: fixed["codec"][name] for name in ("name", "whitening", "ratio")}
    del fixed["teacher"]["alpha_bars"], fixed["teacher"]["snrs"]
    fixed["teacher"].setdefault("ddim_steps", None)
    condition = fixed["teacher"].pop("condition", None)
    if condition is not None:
        causes = {name: condition[name] for name in ("kind", "number", "prompt") if name in condition}
        fixed["teacher"]["condition"] = causes | condition
    if options.shard_rows is None:
        del fixed["shard_rows"]
    # Another seed changes the sample list too, other taps or views the ratio of a size: name causes before effects.
    return {name: fixed[name] for name in ("seed", "flips", "draws", "average", "teacher")} | fixed


def require_same_job(root: Path, found: Json, wanted: Json, job: Job) -> None:
    """Raise CacheMismatchError naming the field of `wanted` that a cache's recipe has otherwise, or what of the images.

    The images come last, since an option, such as the seed, may be why their list is another one.
    """
    lists = ("num_samples", "samples_sha256")
    require_same(root, found, {name: value for name, value in wanted.items() if name not in lists})
    if any(found[name] != wanted[name] for name in lists):
        what = changed_samples(read_table(root / SAMPLES), job.samples)
        raise CacheMismatchError(
            f"{root} holds a cache of another recipe: of other images: {what}; give the images and the --limit that it "
            "was begun with, or another --out"
        )


def _recipe(job: Job, codec: CodecSpec, shard_rows: int, measured: Measured) -> Recipe:
    return Recipe(
        teacher=job.teacher.spec,
        view=job.view,
        codec=codec,
        samples_sha256=hash_samples(job.samples),
        num_samples=len(job.samples),
        flips=len(job.flips) == 2,
        draws=job.draws,
        average=job.average,
        seed=job.seed,
        shard_rows=shard_rows,
        images="view" if job.stores_images else "none",
        equivariance=measured.equivariance,
        round_trip=measured.round_trip,
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
    shard_rows = options.shard_rows or _shard_rows(count, bytes_a_row)
    recipe = _recipe(job, fitted.spec, shard_rows, measured)
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
