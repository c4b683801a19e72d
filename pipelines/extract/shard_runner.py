"""The shard runner: images in, written shards out, in any process; it knows no scheduler and commits nothing."""

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from dtcache.cache.fitted_codec import load_fit
from dtcache.codec import FeatureEncoder
from dtcache.device import resolve_compute
from dtcache.images import load_views
from dtcache.options import ExtractOptions
from dtcache.store.manifest import CacheManifest
from dtcache.store.pending_shard import ShardData, WrittenShard, write_attempt
from pipelines.extract.plan import Job
from pipelines.extract.shard import run_shard

T = TypeVar("T")

MOST_DECODE_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRunner:
    """A cache's job, teacher and codec, ready for any of its shards."""

    root: Path
    manifest: CacheManifest
    job: Job
    encoder: FeatureEncoder

    def write(
        self,
        shards: Sequence[int],
        on_rows: Callable[[int], None],
        finish: Callable[[WrittenShard], T],
    ) -> Generator[T, None, None]:
        """Compute shards, write each beside its place, and yield what `finish` makes of it; `on_rows` hears of rows.

        Writing and `finish` run in a thread, beside the next shard's computation; they end whatever stops that.
        """
        fitted = int(self.manifest.recipe["codec"]["fit_rows"])
        todo = (
            self.job.samples[row].index for shard in shards for row in self.manifest.rows_of(shard)
        )
        views = load_views(
            self.job.source, todo, self.job.view, threads=decode_threads(self.job.teacher.device)
        )
        with ThreadPoolExecutor(1, "write") as pool:
            writing: Future[T] | None = None

            def counted(rows: int) -> None:
                if writing is not None and writing.done():
                    writing.result()  # a full disk stops the next shard at once, not at its end
                on_rows(rows)

            def written(data: ShardData) -> T:
                return finish(write_attempt(self.root, self.manifest, data))

            for shard in shards:
                data = run_shard(
                    self.job,
                    self.encoder,
                    shard,
                    self.manifest.rows_of(shard),
                    views,
                    fitted,
                    counted,
                )
                if writing is not None:
                    yield writing.result()
                writing = pool.submit(written, data)
            if writing is not None:
                yield writing.result()


def decode_threads(device: torch.device) -> int:
    """Return the threads that decode images: all cores beside a GPU, two beside passes that need the cores."""
    return min(MOST_DECODE_THREADS, os.cpu_count() or 1) if device.type == "cuda" else 2


def make_runner(
    root: Path, manifest: CacheManifest, job: Job, options: ExtractOptions
) -> ShardRunner:
    """Read a cache's codec onto the device of the options. Raises CacheDamagedError."""
    encoder = FeatureEncoder(
        load_fit(root, manifest), resolve_compute(options.device, options.precision).device
    )
    return ShardRunner(root=root, manifest=manifest, job=job, encoder=encoder)
