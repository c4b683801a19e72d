"""An extraction's workers: which there are, what they are told, what one does with a shard and keeps for the next."""

import gc
import json
import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from dtcache._version import __version__
from dtcache.device import cpu_threads
from dtcache.errors import (
    CacheDamagedError,
    CacheMismatchError,
    CacheNotFoundError,
    ClusterError,
    ConfigError,
)
from dtcache.hashing import canonical_json
from dtcache.images import open_source
from dtcache.options import ExtractOptions
from dtcache.recipe import Json
from dtcache.store.layout import CLUSTER_LOG
from dtcache.store.manifest import CacheManifest, read_manifest, require_same
from dtcache.store.pending_shard import WrittenShard, drop_temporaries
from dtcache.store.sample_index import hash_samples
from dtcache.store.writer import CacheWriter
from pipelines.extract.plan import Job, make_job
from pipelines.extract.recipe_options import stored_prompt
from pipelines.extract.shard_runner import ShardRunner, make_runner

if TYPE_CHECKING:
    from dask.distributed import Client

T = TypeVar("T")

_ALONE = threading.Lock()
"""A teacher serves one shard at a time, and fills its device: other threads of a worker wait."""
_RESIDENT: dict[str, ShardRunner] = {}
"""The runner of the assignment, and so of the recipe, that this process had last; at most one."""


def require_one_cluster(options: ExtractOptions, named: bool) -> None:
    """Raise ConfigError where options name two clusters, or one GPU for many workers, or a dashboard of none.

    `named` says whether the teacher is one that workers can load by its name.
    """
    if (options.workers or options.scheduler) and not named:
        raise ConfigError(
            "--workers, --scheduler: a CallableTeacher lives in this process; leave them out"
        )
    if options.workers and options.scheduler:
        raise ConfigError(
            f"--workers {options.workers} starts a cluster, --scheduler {options.scheduler} uses one: give one of them"
        )
    if options.workers and ":" in options.device:
        raise ConfigError(
            f"--device {options.device} names one GPU, and --workers take one each: give --device cuda, and choose "
            "GPUs with CUDA_VISIBLE_DEVICES"
        )
    if options.dashboard and not options.workers:
        raise ConfigError(
            "--dashboard: expected --workers beside it; a scheduler of your own has its own dashboard"
        )


@contextmanager
def connected(out: Path, job: Job, options: ExtractOptions) -> Iterator["Client | None"]:
    """Give the workers that options ask for, before anything long begins, or none; at the end no file of theirs stays.

    Raises ConfigError and ClusterError.
    """
    refused = False
    try:
        if not (options.workers or options.scheduler):
            yield None
            return
        from pipelines.extract.workers.cluster import existing_cluster, local_cluster  # loads Dask

        if options.scheduler:
            cluster = existing_cluster(options.scheduler, log=out / CLUSTER_LOG)
        else:
            environments = _environments(options.workers or 1, job.teacher.spec.device_type)
            cluster = local_cluster(
                environments, dashboard=options.dashboard, log=out / CLUSTER_LOG
            )
        del job
        with cluster as client:
            yield client
    except (CacheMismatchError, CacheDamagedError):
        refused = True  # nothing is removed from a cache of another recipe, or one that is damaged
        raise
    finally:
        if not refused:
            drop_temporaries(out)


def on_workers(
    client: "Client",
    images: Path,
    writer: CacheWriter,
    options: ExtractOptions,
    on_rows: Callable[[int], None],
    finish: Callable[[WrittenShard], T],
) -> Generator[T, None, None]:
    """Yield what `finish`, in this process, makes of the missing shards, as workers write them."""
    from pipelines.extract.workers.coordinator import ClusterRun

    gc.collect()
    torch.cuda.empty_cache()  # what the coordinator's teacher has left

    rows = {shard: len(writer.manifest.rows_of(shard)) for shard in writer.missing}
    assignment = make_assignment(writer.root, writer.manifest, images, options)
    with closing(ClusterRun(client, compute, assignment, rows, on_rows).results()) as written:
        yield from map(finish, written)


def make_assignment(
    root: Path, manifest: CacheManifest, images: Path, options: ExtractOptions
) -> str:
    """Return, as JSON, all that a worker needs to compute shards of a cache: where things lie, and what is resolved.

    Paths are absolute: workers share the file system, but not the working folder.
    """
    spec = manifest.recipe["teacher"]
    teacher = Path(options.teacher)
    view = manifest.recipe["view"]
    resolved = replace(
        options,
        teacher=str(teacher.absolute()) if teacher.is_dir() else options.teacher,
        size=f"{view['height']}x{view['width']}",
        batch_size=spec["batch_size"],
        device=spec["device_type"],
        precision=spec["precision"],
        shard_rows=manifest.recipe["shard_rows"],
        threads=manifest.recipe.get("threads"),
        workers=None,
        scheduler=None,
        dashboard=False,
    )
    body: Json = {
        "dtcache": __version__,
        "torch": torch.__version__,
        "root": str(root.absolute()),
        "fingerprint": manifest.fingerprint,
        "images": str(images.absolute()),
        # On a GPU their number is nothing to the bytes: a local worker takes its share of the cores.
        "threads": resolved.threads
        or (max(1, torch.get_num_threads() // options.workers) if options.workers else None),
        "options": asdict(resolved),
    }
    return canonical_json(body).decode()


def _environments(count: int, device_type: str) -> list[dict[str, str]]:
    """Return the environment of each local worker: one GPU each, where the recipe's device is one.

    Raises ConfigError for more workers than GPUs.
    """
    if device_type != "cuda":
        return [{}] * count
    gpus = torch.cuda.device_count()
    if count > gpus:
        raise ConfigError(
            f"--workers {count}: expected at most one a GPU, and this machine offers {gpus}"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names.split(",")[:count]]


def compute(assignment: str, shard: int, on_rows: Callable[[int], None]) -> WrittenShard:
    """Compute a shard and write it to temporary files of the cache's folder.

    Raises ClusterError where this process is not fit for the cache, and what loading, computing and writing raise.
    """
    with _ALONE, cpu_threads(json.loads(assignment)["threads"]):
        (written,) = _resident(assignment).write([shard], on_rows, lambda written: written)
        return written


def _resident(assignment: str) -> ShardRunner:
    """Return the runner that is here already, or make it, with every check that a resume makes of its inputs."""
    if assignment not in _RESIDENT:
        _RESIDENT.clear()  # a teacher fills its device: the last one goes first
        _RESIDENT[assignment] = _load(json.loads(assignment))
    return _RESIDENT[assignment]


def _load(asked_for: Json) -> ShardRunner:
    for library, here in (("dtcache", __version__), ("torch", torch.__version__)):
        if asked_for[library] != here:
            raise ClusterError(
                f"it has {library} {here}, the coordinator {asked_for[library]}: other versions give other bytes; "
                "install the same ones everywhere"
            )
    root = Path(asked_for["root"])
    manifest = _require_cache(root, asked_for["fingerprint"])
    values: Json = {
        name: tuple(v) if isinstance(v, list) else v for name, v in asked_for["options"].items()
    }
    options = ExtractOptions(**values)
    job = make_job(
        open_source(Path(asked_for["images"])), options, stored=stored_prompt(root, manifest)
    )
    # What else the recipe holds came with the options.
    teacher = json.loads(canonical_json(asdict(job.teacher.spec)))
    require_same(
        root, manifest.recipe, {"teacher": teacher, "samples_sha256": hash_samples(job.samples)}
    )
    return make_runner(root, manifest, job, options)


def _require_cache(root: Path, fingerprint: str) -> CacheManifest:
    """Read the manifest of the cache that the coordinator writes. Raises ClusterError where it is not here."""
    advice = "give an --out on storage that the coordinator and all workers share, under one path"
    try:
        manifest = read_manifest(root)
    except (CacheNotFoundError, CacheDamagedError) as error:
        raise ClusterError(f"it does not see the cache {root} ({error}); {advice}") from error
    if manifest.fingerprint != fingerprint:
        raise ClusterError(f"it sees another cache at {root} than the coordinator; {advice}")
    return manifest
