"""Computes shards on a Dask worker, which loads the teacher of an assignment once."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from dtcache._version import __version__
from dtcache.errors import CacheDamagedError, CacheNotFoundError, ClusterError
from dtcache.images import open_source
from dtcache.options import ExtractOptions
from dtcache.process_settings import cpu_threads
from dtcache.recipe import Json, spec_json
from dtcache.store.manifest import CacheManifest, read_manifest, require_same
from dtcache.store.pending_shard import WrittenShard
from dtcache.store.sample_index import hash_samples
from pipelines.extract.begun_cache import BegunCache
from pipelines.extract.plan import make_plan
from pipelines.extract.shard_runner import ShardRunner, open_shard_runner


class ShardWorker:
    """Computes shards, one at a time, and keeps the teacher of the last assignment."""

    def __init__(self) -> None:
        # A teacher computes one shard at a time and fills its device: other threads wait.
        self._lock = threading.Lock()
        self._assignment: str | None = None
        self._runner: ShardRunner | None = None

    @property
    def assignment(self) -> str | None:
        """The assignment whose teacher is loaded, or None."""
        return self._assignment

    def compute(self, assignment: str, shard: int, on_rows: Callable[[int], None]) -> WrittenShard:
        """Compute a shard and write it to temporary files of the cache's folder.

        Raises ClusterError if this process cannot compute the cache, and what loading, computing
        and writing raise.
        """
        with self._lock, cpu_threads(json.loads(assignment)["threads"]):
            (written,) = self.runner(assignment).run([shard], on_rows)
            return written

    def runner(self, assignment: str) -> ShardRunner:
        """Return the runner of an assignment; load it if it is not the last one.

        Loading checks the inputs as a resume does.
        """
        if self._runner is None or assignment != self._assignment:
            # A teacher fills its device: the last one is freed before the next is loaded.
            self._runner = None
            self._assignment = None
            self._runner = _load(json.loads(assignment))
            self._assignment = assignment
        return self._runner


def compute(assignment: str, shard: int, on_rows: Callable[[int], None]) -> WrittenShard:
    """Compute a shard on the Dask worker that runs this task (see `ShardWorker.compute`)."""
    return shard_worker().compute(assignment, shard, on_rows)


def shard_worker() -> ShardWorker:
    """Return the one ShardWorker of this Dask worker, which keeps it between tasks."""
    from dask.distributed import get_worker  # loads Dask

    state: ShardWorker = vars(get_worker()).setdefault("dtcache_shard_worker", ShardWorker())
    return state


def _load(assignment: Json) -> ShardRunner:
    for library, version in (("dtcache", __version__), ("torch", torch.__version__)):
        if assignment[library] != version:
            raise ClusterError(
                f"it has {library} {version}, the coordinator {assignment[library]}: other "
                "versions give other bytes; install the same versions everywhere"
            )
    root = Path(assignment["root"])
    manifest = _require_cache(root, assignment["fingerprint"])
    values: Json = {
        name: tuple(v) if isinstance(v, list) else v for name, v in assignment["options"].items()
    }
    options = ExtractOptions(**values)
    plan = make_plan(
        open_source(Path(assignment["images"]), options),
        options,
        begun=BegunCache(root=root, manifest=manifest),
    )
    # The options came from the recipe: only the teacher and the images can differ.
    # A None, which JSON leaves out, must find no value in the recipe.
    teacher = {**dict.fromkeys(asdict(plan.teacher.spec)), **spec_json(plan.teacher.spec)}
    fixed = {"teacher": teacher, "samples_sha256": hash_samples(plan.samples)}
    require_same(root, manifest.recipe, fixed)
    return open_shard_runner(root, manifest, plan)


def _require_cache(root: Path, fingerprint: str) -> CacheManifest:
    """Return the manifest of the coordinator's cache. Raises ClusterError if it is not here."""
    advice = "pass an `out` on storage that the coordinator and all workers share, under one path"
    try:
        manifest = read_manifest(root)
    except (CacheNotFoundError, CacheDamagedError) as error:
        raise ClusterError(f"it does not see the cache {root} ({error}); {advice}") from error
    if manifest.fingerprint != fingerprint:
        raise ClusterError(f"it sees another cache at {root} than the coordinator; {advice}")
    return manifest
