"""Runners of an extraction: this process, or Dask workers and the assignment that they get."""

import gc
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from dtcache._version import __version__
from dtcache.errors import CacheDamagedError, CacheMismatchError, ConfigError
from dtcache.hashing import canonical_json
from dtcache.options import ExtractOptions
from dtcache.recipe import Json
from dtcache.store.layout import CLUSTER_LOG
from dtcache.store.manifest import CacheManifest
from dtcache.store.pending_shard import WrittenShard, drop_temporaries
from pipelines.extract.plan import ExtractionPlan
from pipelines.extract.shard_runner import open_shard_runner
from pipelines.extract.workers.worker import compute
from pipelines.make_teacher import options_from_recipe

if TYPE_CHECKING:
    from dask.distributed import Client


class Runner(Protocol):
    """Computes shards of a cache, in this process or in others; commits nothing."""

    @property
    def teacher_seconds(self) -> float | None:
        """Seconds that this process's teacher has run; None if other processes run it."""

    def run(
        self,
        manifest: CacheManifest,
        shards: Sequence[int],
        on_rows: Callable[[int], None],
    ) -> Generator[WrittenShard, None, None]:
        """Yield the shards, in any order, once their temporary files are durable.

        `on_rows` is called with numbers of finished rows, in the thread that iterates.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRunner:
    """Computes shards in this process."""

    root: Path
    plan: ExtractionPlan

    @property
    def teacher_seconds(self) -> float:
        """Seconds that the teacher has run."""
        return self.plan.teacher.clock.seconds

    def run(
        self,
        manifest: CacheManifest,
        shards: Sequence[int],
        on_rows: Callable[[int], None],
    ) -> Generator[WrittenShard, None, None]:
        """Yield the shards in order."""
        yield from open_shard_runner(self.root, manifest, self.plan).run(shards, on_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterRunner:
    """Computes shards on the workers of a Dask scheduler."""

    client: "Client"
    images: Path
    root: Path
    options: ExtractOptions

    @property
    def teacher_seconds(self) -> None:
        """None: the teachers run in other processes."""
        return None

    def run(
        self,
        manifest: CacheManifest,
        shards: Sequence[int],
        on_rows: Callable[[int], None],
    ) -> Generator[WrittenShard, None, None]:
        """Yield the shards as workers finish them. Raises ClusterError."""
        from pipelines.extract.workers.coordinator import ClusterRun

        # The teacher of this process is no longer referenced: free its memory for the workers.
        gc.collect()
        torch.cuda.empty_cache()
        rows = {shard: len(manifest.rows_of(shard)) for shard in shards}
        assignment = make_assignment(self.root, manifest, self.images, self.options)
        yield from ClusterRun(self.client, compute, assignment, rows, on_rows).results()


@contextmanager
def start_runner(images: Path, out: Path, plan: ExtractionPlan) -> Iterator[Runner]:
    """Yield the runner that the options name: this process, local workers, or those of a scheduler.

    Workers start here, before the codec is fitted, so that a cluster that cannot be used is refused
    at once. At the end the temporary files in `out` are removed. Raises ConfigError and
    ClusterError.
    """
    options = plan.options
    refused = False
    try:
        if not (options.workers or options.scheduler):
            yield LocalRunner(root=out, plan=plan)
            return
        from pipelines.extract.workers.cluster import existing_cluster, local_cluster  # loads Dask

        log = out / CLUSTER_LOG
        if options.scheduler:
            cluster = existing_cluster(options.scheduler, log=log)
        else:
            environments = worker_environments(options.workers or 1, plan.teacher.spec.device_type)
            cluster = local_cluster(environments, dashboard=options.dashboard, log=log)
        del plan  # frees its teacher's device memory for the teachers of local workers
        with cluster as client:
            yield ClusterRunner(client=client, images=images, root=out, options=options)
    except (CacheMismatchError, CacheDamagedError):
        refused = True  # nothing is removed from a different cache, or from a damaged one
        raise
    finally:
        if not refused:
            drop_temporaries(out)


def make_assignment(
    root: Path, manifest: CacheManifest, images: Path, options: ExtractOptions
) -> str:
    """Return, as JSON, all that a worker needs to compute shards of a cache.

    Every option is resolved, and paths are absolute: workers share the file system, but not the
    working folder.
    """
    folder = Path(options.teacher)
    teacher = str(folder.absolute()) if folder.is_dir() else options.teacher
    resolved = options_from_recipe(manifest.recipe, teacher)
    threads = resolved.threads
    if threads is None and options.workers:
        # On a GPU the bytes do not depend on the threads: local workers share the cores.
        threads = max(1, torch.get_num_threads() // options.workers)
    body: Json = {
        "dtcache": __version__,
        "torch": torch.__version__,
        "root": str(root.absolute()),
        "fingerprint": manifest.fingerprint,
        "images": str(images.absolute()),
        "threads": threads,
        "options": asdict(resolved) | asdict(options.reading),
    }
    return canonical_json(body).decode()


def worker_environments(count: int, device_type: str) -> list[dict[str, str]]:
    """Return the environment variables of each local worker: on GPUs, one GPU per worker.

    Raises ConfigError if there are more workers than GPUs.
    """
    if device_type != "cuda":
        return [{}] * count
    gpus = torch.cuda.device_count()
    if count > gpus:
        raise ConfigError(
            f"`workers` {count}: expected at most one per GPU, and this machine has {gpus}"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names.split(",")[:count]]
