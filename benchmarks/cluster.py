"""Compare extraction with two workers and with one worker, each of one thread, in images/s.

    python benchmarks/cluster.py [--work runs/cluster] [--images 1024] [--rounds 5]

The cache has the CIFAR-10 teacher's features of generated scenes, for both flips. The script fits
the codec once and keeps the cache without shards. In every round it copies this cache and times all
shards, from the first submitted task to the last commit, first on one worker and then on two.
Start-up is not timed: both clusters run all the time, and each worker computes a shard before the
first round, so that its teacher is loaded and its kernels are compiled.

The script also times bare forward passes of the teacher, on one worker and on two at once. Their
speed-up is the upper limit on this machine. It is below 2 if the cores share caches, memory
bandwidth or a clock. Results: docs/results/cluster.json.
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

from dtcache.images import open_source
from dtcache.options import ExtractOptions
from dtcache.process_settings import cpu_threads
from dtcache.store.writer import CacheWriter
from pipelines.extract.open_writer import begin_cache
from pipelines.extract.plan import make_plan
from pipelines.extract.workers import worker
from pipelines.extract.workers.cluster import local_cluster
from pipelines.extract.workers.dispatch import ClusterRunner, make_assignment
from pipelines.extract.workers.task import Failed, run_task
from pipelines.write_scenes import write_scenes

GOAL = 1.7
"""Speed-up of two workers over one."""
SHARDS = 16
PASSES = 20
"""Timed forward passes per worker and round."""
LABELS = {1: "1 worker", 2: "2 workers"}
TEACHER = ROOT / "benchmarks" / "teachers" / "cifar10"


def main() -> None:
    """Measure, print and record the speed-up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/cluster"),
        help="folder of scenes and caches [runs/cluster]",
    )
    parser.add_argument("--images", type=int, default=1024, help="number of scenes [1024]")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds [5]")
    results_flag(parser)
    args = parser.parse_args()
    started = time.time()
    options = ExtractOptions(
        teacher=str(TEACHER),
        device="cpu",
        precision="fp32",
        threads=1,
        batch_size=32,
        shard_rows=args.images // SHARDS,
    )
    args.work.mkdir(parents=True, exist_ok=True)
    images = args.work / "scenes" / "images"
    empty_cache = args.work / "begun"
    if not images.exists():
        write_scenes(images.parent, seed=0, size=32, count=args.images)
    shutil.rmtree(empty_cache, ignore_errors=True)
    empty_cache.mkdir()
    with cpu_threads(1):
        begin_cache(empty_cache, make_plan(open_source(images), options))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    pass_seconds: dict[int, list[float]] = {1: [], 2: []}
    with ExitStack() as stack:
        clients = {
            count: stack.enter_context(
                local_cluster([{}] * count, dashboard=False, log=args.work / f"cluster-{count}.log")
            )
            for count in LABELS
        }
        root = args.work / "cache"
        writer = copy_cache(empty_cache, root)
        assignment = make_assignment(root, writer.manifest, images, options)
        for count, client in clients.items():
            client.wait_for_workers(count)
            for shard in run_on_all_workers(
                client, run_task, worker.compute, assignment, 0, "warm-up"
            ):
                if isinstance(shard, Failed):
                    raise RuntimeError(f"{shard.worker}: the warm-up failed: {shard.reason}")
        for _ in range(args.rounds):
            for count, client in clients.items():
                pass_seconds[count].append(
                    max(run_on_all_workers(client, time_forward_passes, assignment))
                )
                seconds[count].append(
                    time_extraction(client, copy_cache(empty_cache, root), images, options)
                )
                rate = args.images / seconds[count][-1]
                print(f"{LABELS[count]}: {rate:.1f} images/s", flush=True)
    speedup = statistics.median(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    limit = statistics.median(
        2 * one / two for one, two in zip(pass_seconds[1], pass_seconds[2], strict=True)
    )
    result = {
        "images": args.images,
        "views_per_image": 2,
        "images_per_second": {
            LABELS[count]: round(args.images / statistics.median(rounds), 1)
            for count, rounds in seconds.items()
        },
        "speedup": round(speedup, 3),
        "goal": GOAL,
        "goal_met": speedup >= GOAL,
        "bare_pass_speedup": round(limit, 3),
        "speedup_over_bare_pass_speedup": round(speedup / limit, 3),
        "seconds": {
            LABELS[count]: [round(s, 2) for s in rounds] for count, rounds in seconds.items()
        },
    }
    print(f"speed-up of two workers over one: {speedup:.2f} (goal {GOAL})")
    print(f"upper limit, speed-up of bare forward passes: {limit:.2f}")
    command = f"python benchmarks/cluster.py --images {args.images} --rounds {args.rounds}"
    write(args.results / "cluster.json", command, result, time.time() - started)


def copy_cache(empty_cache: Path, root: Path) -> CacheWriter:
    """Copy the cache without shards to `root` and return the writer of the copy.

    `root` is the same in every round, so that workers reuse the teacher that they have loaded.
    """
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(empty_cache, root)
    return CacheWriter.resume(root)


def run_on_all_workers(client: Client, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run a task once on every worker, on all workers at once, and return the results."""
    futures = [client.submit(task, *arguments, workers=[a], pure=False) for a in client.nthreads()]
    results: list[Any] = client.gather(futures)
    return results


def time_extraction(
    client: Client, writer: CacheWriter, images: Path, options: ExtractOptions
) -> float:
    """Compute and commit all shards of a cache; return the seconds up to the last commit."""
    started = time.perf_counter()
    runner = ClusterRunner(client=client, images=images, root=writer.root, options=options)
    for shard in runner.run(writer.manifest, writer.missing, lambda count: None):
        writer.commit(shard)
    if writer.missing:
        raise RuntimeError(f"shards {writer.missing} were not written. Expected no missing shard.")
    return time.perf_counter() - started


def time_forward_passes(assignment: str) -> float:
    """Run bare forward passes of a worker's teacher, on that worker; return the seconds."""
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
