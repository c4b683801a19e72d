"""Stage 1: from images and a teacher to a sealed cache, one shard after the other."""

import platform
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from dtcache._version import __version__
from dtcache.atomic_files import FolderLock
from dtcache.errors import ExtractionError
from dtcache.images import Survey
from dtcache.options import ExtractOptions
from dtcache.process_settings import cpu_threads
from dtcache.recipe import FailedSample
from dtcache.store.commits import EmptySample
from dtcache.store.writer import CacheWriter
from dtcache.teacher import CallableTeacher
from pipelines.extract.open_writer import open_writer
from pipelines.extract.plan import plan_extraction
from pipelines.extract.workers.dispatch import Runner, start_runner
from pipelines.terminal.progress import Tracker, track

LEAST_FAILURES = 10
"""Fewer failed images never stop an extraction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extracted:
    """The result of an extraction."""

    root: Path
    num_done: int
    """Images with features, over all runs."""
    failures: tuple[FailedSample, ...]
    """Images without features, over all runs."""
    empty: tuple[EmptySample, ...]
    """Images with features that surely show nothing; none if the cache was sealed before."""
    seconds: float
    """Total time of this run."""
    fit_seconds: float
    """Time of this run to fit the codec and measure the teacher; 0 if a cache was resumed."""
    shard_seconds: float
    """Time of this run from the start of the first shard to the commit of the last one."""


def extract(
    images: Path, out: Path, options: ExtractOptions, teacher: CallableTeacher | None = None
) -> Extracted:
    """Cache a teacher's features of `images` in `out`, or resume a cache of the same recipe there.

    `teacher` is a teacher made in Python; leave `options.teacher` empty with it. Raises
    CacheMismatchError, naming the field, if `out` holds a different cache, and what planning,
    fitting, computing and writing raise.
    """
    started = time.time()
    plan = plan_extraction(images, out, options, teacher)
    options = plan.options
    resumed = plan.begun is not None
    with (
        FolderLock(out) as folder,
        start_runner(images, out, plan) as runner,
        cpu_threads(options.threads),
    ):
        opened = time.time()
        writer = open_writer(out, plan)
        folder.keep()
        survey = plan.source.survey
        del plan  # frees its teacher's device memory for the teachers of local workers
        fitted = time.time()
        rows_this_run = rows_left(writer)
        _compute_shards(runner, writer, options.max_failures)
        computed = time.time()
        writer.seal()
        failures = tuple(writer.failures)
        extracted = Extracted(
            root=out,
            num_done=writer.manifest.num_samples - len(failures),
            failures=failures,
            empty=tuple(writer.empty),
            seconds=time.time() - started,
            fit_seconds=0.0 if resumed else fitted - opened,
            shard_seconds=computed - fitted,
        )
        if rows_this_run:
            _write_log(writer, extracted, rows_this_run, options, survey)
    return extracted


def describe_empty(empty: Sequence[EmptySample]) -> str:
    """Return one line that says how many images surely show nothing, why, and the first of each."""
    first = {sample.reason: sample.key for sample in reversed(empty)}
    counts = Counter(sample.reason for sample in empty).most_common()
    reasons = ", ".join(f"{count} x {reason} (first {first[reason]})" for reason, count in counts)
    return f"{len(empty)} images surely show nothing: {reasons}; their features are cached"


def _compute_shards(runner: Runner, writer: CacheWriter, max_failures: float) -> None:
    """Compute the missing shards, commit each one, report progress."""
    count = writer.manifest.num_samples
    failures = list(writer.failures)
    with track("extract", count, count - rows_left(writer)) as tracker:
        progress = _Progress(tracker, runner, len(failures))
        with closing(runner.run(writer.manifest, writer.missing, progress.rows_done)) as shards:
            for shard in shards:
                failures += shard.record.failures
                require_few_failures(failures, count, max_failures)
                progress.shard_done(writer.commit(shard), len(failures))


class _Progress:
    """Shows finished rows, the share of time that the teacher ran, bytes written and failures."""

    def __init__(self, tracker: Tracker, runner: Runner, num_failed: int) -> None:
        self._tracker = tracker
        self._runner = runner
        self._started = time.time()
        self._busy_before = runner.teacher_seconds
        self._bytes_written = 0
        self._num_failed = num_failed

    def rows_done(self, count: int) -> None:
        """Add finished rows."""
        note = f"{self._bytes_written / 2**20:.1f} MiB written, {self._num_failed} failed"
        busy = self._runner.teacher_seconds
        if busy is not None and self._busy_before is not None:
            share = (busy - self._busy_before) / max(time.time() - self._started, 1e-9)
            note = f"teacher busy {share:.0%}, {note}"
        self._tracker.advance(count, note)

    def shard_done(self, bytes_written: int, num_failed: int) -> None:
        """Add a committed shard; `num_failed` counts the failures of all shards."""
        self._bytes_written += bytes_written
        self._num_failed = num_failed


def rows_left(writer: CacheWriter) -> int:
    """Return the number of rows that are not committed yet."""
    return sum(len(writer.manifest.rows_of(shard)) for shard in writer.missing)


def require_few_failures(failures: Sequence[FailedSample], count: int, max_failures: float) -> None:
    """Raise ExtractionError if ten or more images, and more than a share of `count`, have failed.

    The check comes before the commit of the shard that exceeds the share. Thus, if a disk was
    unmounted, a resume tries that shard again.
    """
    if len(failures) < LEAST_FAILURES or len(failures) <= max_failures * count:
        return
    first = {failed.reason: failed.key for failed in reversed(failures)}
    reasons = Counter(failed.reason for failed in failures).most_common(3)
    summary = "; ".join(f"{times} x {reason} (first {first[reason]})" for reason, times in reasons)
    raise ExtractionError(
        f"{len(failures)} of {count} images failed, more than `max_failures={max_failures:g}` "
        f"allows: {summary}. What is committed stays: check that the images can be read and run "
        "the same command again to resume, or allow more"
    )


def _write_log(
    writer: CacheWriter,
    extracted: Extracted,
    rows: int,
    options: ExtractOptions,
    survey: Survey,
) -> None:
    writer.write_log(
        {
            "images": survey.to_json(),
            "seconds": extracted.seconds,
            "fit_seconds": extracted.fit_seconds,
            "shard_seconds": extracted.shard_seconds,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows_this_run": rows,
            "dtcache": __version__,
            "torch": torch.__version__,
            "host": platform.node(),
            "python": platform.python_version(),
            "empty_images": dict(Counter(empty.reason for empty in extracted.empty)),
            "threads": torch.get_num_threads(),
            "workers": options.workers,
        }
    )
