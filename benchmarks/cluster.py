"""Two one-thread workers against one: images a second of the whole extraction, and what the machine
itself allows.

    python benchmarks/cluster.py [--work runs/cluster] [--images 1024] [--rounds 5]

A cache of generated scenes with the CIFAR-10 teacher, both flips, begun and fitted once; every
round copies that folder and times all its shards from the first submitted task to the last commit,
on one worker and on two, in turn. Start-up is apart: both clusters run all the time, and each
worker has computed a shard before, so that its teacher is loaded and its kernels are compiled. The
limit is what two of these workers do at once, in bare passes of the teacher with nothing else, over
what one does: cores that share caches, memory or a clock give less than 2.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from dask.distributed import Client
from records import ROOT, results_flag, write

from dtcache.device import cpu_threads
from dtcache.images import open_source
from dtcache.images.scenes import write_scenes
from dtcache.options import ExtractOptions
from dtcache.store.writer import CacheWriter
from pipelines.extract.open_writer import begin_cache
from pipelines.extract.plan import make_plan
from pipelines.extract.workers import worker
from pipelines.extract.workers.cluster import local_cluster
from pipelines.extract.workers.dispatch import ClusterRunner, make_assignment
from pipelines.extract.workers.task import run_task

GOAL = 1.7
SHARDS = 16
PASSES = 20
TEACHER = ROOT / "benchmarks" / "teachers" / "cifar10"


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/cluster"))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    results_flag(parser)
    asked = parser.parse_args()
    started = time.time()
    options = ExtractOptions(
        teacher=str(TEACHER),
        device="cpu",
        precision="fp32",
        threads=1,
        batch_size=32,
        shard_rows=asked.images // SHARDS,
    )
    asked.work.mkdir(parents=True, exist_ok=True)
    images = asked.work / "scenes" / "images"
    begun = asked.work / "begun"
    if not images.exists():
        write_scenes(images.parent, seed=0, size=32, count=asked.images)
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir()
    with cpu_threads(1):
        begin_cache(begun, make_plan(open_source(images), options))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    passes: dict[int, list[float]] = {1: [], 2: []}
    with ExitStack() as stack:
        clients = {
            count: stack.enter_context(
                local_cluster(
                    [{}] * count, dashboard=False, log=asked.work / f"cluster-{count}.log"
                )
            )
            for count in (1, 2)
        }
        root = asked.work / "cache"
        writer = fresh(begun, root)
        assignment = make_assignment(root, writer.manifest, images, options)
        for count, client in clients.items():
            client.wait_for_workers(count)
            everywhere(client, run_task, worker.compute, assignment, 0, "warm-up")
        for _ in range(asked.rounds):
            for count, client in clients.items():
                passes[count].append(max(everywhere(client, forward_passes, assignment)))
                seconds[count].append(extraction(client, fresh(begun, root), images, options))
                print(
                    f"{count} workers: {asked.images / seconds[count][-1]:.1f} images/s", flush=True
                )
    ratio = statistics.median(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    limit = statistics.median(2 * one / two for one, two in zip(passes[1], passes[2], strict=True))
    result = {
        "images": asked.images,
        "views an image": 2,
        "images/s": {
            f"{n} workers": round(asked.images / statistics.median(s), 1)
            for n, s in seconds.items()
        },
        "two workers over one": round(ratio, 3),
        "goal": GOAL,
        "met": ratio >= GOAL,
        "limit: bare passes of two workers at once over one": round(limit, 3),
        "share of the limit": round(ratio / limit, 3),
        "seconds": {f"{n} workers": [round(s, 2) for s in taken] for n, taken in seconds.items()},
    }
    print(f"two workers over one: {ratio:.2f} (goal {GOAL}); the machine's limit {limit:.2f}")
    command = f"python benchmarks/cluster.py --images {asked.images} --rounds {asked.rounds}"
    write(asked.results / "cluster.json", command, result, time.time() - started)


def fresh(begun: Path, root: Path) -> CacheWriter:
    """Return the writer of a copy of the begun cache, always in one place: workers keep the teacher
    of that cache.
    """
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(begun, root)
    return CacheWriter.resume(root)


def everywhere(client: Client, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what a task gives on every worker, all of them at once."""
    futures = [client.submit(task, *arguments, workers=[a], pure=False) for a in client.nthreads()]
    found: list[Any] = client.gather(futures)
    return found


def extraction(client: Client, writer: CacheWriter, images: Path, options: ExtractOptions) -> float:
    """Return the seconds that all shards of a begun cache take, up to the last commit."""
    started = time.perf_counter()
    runner = ClusterRunner(client=client, images=images, root=writer.root, options=options)
    for shard in runner.run(writer.manifest, writer.missing, lambda count: None):
        writer.commit(shard)
    assert writer.missing == []
    return time.perf_counter() - started


def forward_passes(assignment: str) -> float:
    """Time bare passes of a worker's teacher, on the worker."""
    with cpu_threads(1):
        teacher = worker.shard_worker().runner(assignment).plan.teacher
        view = teacher.input(np.zeros((3, 32, 32), np.uint8), "key", False, seed=0, draws=[0])
        batch = teacher.batch([view] * teacher.spec.batch_size)
        list(teacher.features(batch))
        started = time.perf_counter()
        for _ in range(PASSES):
            list(teacher.features(batch))
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
