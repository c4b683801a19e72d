"""Computes shards and writes them to temporary files, in any process; commits nothing."""

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from dtcache.cache.fitted_codec import load_fit
from dtcache.codec import FeatureEncoder
from dtcache.images import load_views
from dtcache.store.manifest import CacheManifest
from dtcache.store.pending_shard import WrittenShard, write_attempt
from pipelines.extract.plan import ExtractionPlan
from pipelines.extract.shard import packed_rows, shard_data

MAX_DECODE_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRunner:
    """Computes any shards of a cache, from its plan and its fitted codec."""

    root: Path
    manifest: CacheManifest
    plan: ExtractionPlan
    encoder: FeatureEncoder

    def run(
        self, shards: Sequence[int], on_rows: Callable[[int], None]
    ) -> Generator[WrittenShard, None, None]:
        """Compute shards, write each to temporary files, and yield it once these are durable.

        A thread writes a shard while the next one is computed. If a shard cannot be computed, the
        shard before it is yielded first. `on_rows` is called with the number of rows of each
        finished batch.
        """
        samples = self.plan.samples
        indices = (samples[row].index for shard in shards for row in self.manifest.rows_of(shard))
        threads = decode_threads(self.plan.teacher.device)
        views = load_views(self.plan.source, indices, self.plan.view, threads=threads)
        fit_rows = int(self.manifest.recipe["codec"]["fit_rows"])
        with ThreadPoolExecutor(1, "write") as pool:
            writing: Future[WrittenShard] | None = None
            for shard in shards:
                rows = self.manifest.rows_of(shard)
                packed = []
                try:
                    for row in packed_rows(self.plan, self.encoder, rows, views, on_rows):
                        packed.append(row)
                        # Checked after every row, so that a full disk stops the work at once.
                        if writing is not None and writing.done():
                            written = writing
                            writing = None
                            yield written.result()
                except (Exception, KeyboardInterrupt):
                    if writing is not None:
                        yield writing.result()
                    raise
                if writing is not None:
                    yield writing.result()
                data = shard_data(self.plan, shard, rows, packed, fit_rows)
                writing = pool.submit(write_attempt, self.root, self.manifest, data)
            if writing is not None:
                yield writing.result()


def open_shard_runner(root: Path, manifest: CacheManifest, plan: ExtractionPlan) -> ShardRunner:
    """Return the runner of a cache, whose codec is read from the disk. Raises CacheDamagedError."""
    encoder = FeatureEncoder(load_fit(root, manifest), plan.teacher.device)
    return ShardRunner(root=root, manifest=manifest, plan=plan, encoder=encoder)


def decode_threads(device: torch.device) -> int:
    """Return how many threads decode images: all cores for a GPU; two if a CPU runs the passes."""
    return min(MAX_DECODE_THREADS, os.cpu_count() or 1) if device.type == "cuda" else 2
