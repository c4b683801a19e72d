"""Dask workers with a shard runner without torch: deaths, failures, late results, no scheduler."""

import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dask.distributed import Client, Future, Scheduler
from store import fake_shards
from store.builders import FEATURES, VIEW, tiny_plan, tree

from dtcache.errors import ClusterError
from dtcache.images.stored_images import image_bound
from dtcache.recipe import Sample
from dtcache.store.layout import CLUSTER_LOG, payload_arrays
from dtcache.store.pending_shard import WrittenShard, drop_temporaries
from dtcache.store.sample_index import hash_samples
from dtcache.store.writer import CacheWriter
from pipelines.extract.workers import cluster as connect
from pipelines.extract.workers import coordinator as run
from pipelines.extract.workers.cluster import existing_cluster, local_cluster
from pipelines.extract.workers.coordinator import ClusterRun


def begin(root: Path, shards: int) -> CacheWriter:
    """Begin a cache of many shards of two rows."""
    plan = tiny_plan()
    samples = [Sample(index=row, key=f"{row:06}.png", label=None) for row in range(2 * shards)]
    recipe = replace(
        plan.recipe, num_samples=len(samples), shard_rows=2, samples_sha256=hash_samples(samples)
    )
    bounds = {FEATURES: plan.arrays[FEATURES].length}
    root.mkdir()
    arrays = payload_arrays(recipe, image_bound(VIEW), bounds)
    return CacheWriter.create(root, recipe, arrays, plan.fit, samples, None)


def finish(
    writer: CacheWriter,
    workers: int,
    task: Callable[..., WrittenShard] = fake_shards.write,
    **told: object,
) -> int:
    """Write the missing shards on local workers and seal; return the rows reported as progress."""
    rows = dict.fromkeys(writer.missing, 2)
    told_rows = []
    assignment = json.dumps({"root": str(writer.root), **told})
    with local_cluster([{}] * workers, dashboard=False, log=writer.root / CLUSTER_LOG) as client:
        for made in ClusterRun(client, task, assignment, rows, told_rows.append).results():
            writer.commit(made)
    drop_temporaries(writer.root)
    writer.seal()
    assert all(count > 0 for count in told_rows)
    return sum(told_rows)


def content(root: Path) -> dict[str, bytes | None]:
    """Return a cache's files without the cluster's log."""
    return {name: data for name, data in tree(root).items() if name != CLUSTER_LOG}


def planned(root: Path, shards: int) -> dict[str, bytes | None]:
    """Return the files of the same cache written by one process."""
    writer = begin(root, shards)
    for shard in writer.missing:
        writer.write_shard(fake_shards.planned(writer.manifest, shard))
    writer.seal()
    return content(root)


def tasks_of(dask_scheduler: Scheduler) -> list[str]:
    """Return the tasks of dtcache that a scheduler holds."""
    return [str(key) for key in dask_scheduler.tasks if "dtcache" in str(key)]


def test_two_workers_that_die_lose_nothing(tmp_path: Path) -> None:
    """Two killed workers change no byte of the cache and no row is reported twice."""
    writer = begin(tmp_path / "cache", 40)
    assert finish(writer, 2, deaths=0.1) == 80
    assert content(tmp_path / "cache") == planned(tmp_path / "one", 40)


@pytest.mark.slow
def test_a_thousand_shards_and_many_deaths(tmp_path: Path) -> None:
    """Dozens of worker deaths lose none of a thousand shards and count none twice."""
    writer = begin(tmp_path / "cache", 1000)
    assert finish(writer, 4, deaths=0.04) == 2000
    assert content(tmp_path / "cache") == planned(tmp_path / "one", 1000)
    assert (tmp_path / "cache" / CLUSTER_LOG).read_text().count("Restarting worker") > 10


def test_a_task_that_dask_has_lost_is_submitted_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all workers are idle and no result arrives, pending shards are submitted again."""
    monkeypatch.setattr(run, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(run, "COLLECT_SECONDS", 0.5)
    real = Client.submit
    lost = []

    def submit(client: Client, *arguments: object, **named: object) -> Future:
        if len(lost) < 2:
            lost.append(named["key"])
            return Future(f"lost-{named['key']}", client)  # a key that no worker computes
        return real(client, *arguments, **named)

    monkeypatch.setattr(Client, "submit", submit)
    writer = begin(tmp_path / "cache", 6)
    assert finish(writer, 1) == 12
    assert len(lost) == 2
    assert content(tmp_path / "cache") == planned(tmp_path / "one", 6)
    assert (
        "every worker is idle with 2 shards in flight"
        in (tmp_path / "cache" / CLUSTER_LOG).read_text()
    )


def test_a_shard_that_fails_is_tried_elsewhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A shard that fails on one worker is computed by another, and only the log has the error."""
    writer = begin(tmp_path / "cache", 6)
    assert finish(writer, 2, fake_shards.fail, fails="first") == 12
    assert content(tmp_path / "cache") == planned(tmp_path / "one", 6)
    assert "failed on tcp://127.0.0.1" in (tmp_path / "cache" / CLUSTER_LOG).read_text()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (
            "refused",
            r"^worker tcp://\S+: it has torch 1\.0, the coordinator 2\.0 \(what is committed "
            r"stays: run the same",
        ),
        (
            "always",
            r"^shard \d failed 3 times, on tcp://.*; the last time: MemoryError: no memory left "
            r"\(what is",
        ),
        (
            "dies",
            r"^shard \d failed 3 times, .*: its workers died while computing it: killed, or out of "
            r"memory \(what is",
        ),
    ],
)
def test_a_failure_everywhere_is_one_clear_line(
    tmp_path: Path, fails: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that fails on every worker ends the run after bounded attempts, with one message."""
    monkeypatch.setattr(connect, "DEATHS_PER_ATTEMPT", 0)
    writer = begin(tmp_path / "cache", 3)
    before = content(tmp_path / "cache")
    with pytest.raises(ClusterError, match=message):
        finish(writer, 1, fake_shards.fail, fails=fails)
    assert content(tmp_path / "cache") == before


def test_a_scheduler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreachable or malformed scheduler address is an error of one line."""
    monkeypatch.setattr(connect, "CONNECT_SECONDS", 1)
    for address in ("tcp://127.0.0.1:9", "nowhere://x"):
        message = (
            rf"^`scheduler` {address}: no Dask scheduler can be reached there \(.*\); "
            "start one with dask scheduler"
        )
        with (
            pytest.raises(ClusterError, match=message),
            existing_cluster(address, log=tmp_path / "log"),
        ):
            pass


def test_an_existing_scheduler_outlives_the_run(tmp_path: Path) -> None:
    """A run on an existing scheduler leaves no task behind, and its workers stay alive."""
    writer = begin(tmp_path / "cache", 4)
    assignment = json.dumps({"root": str(writer.root)})
    rows = dict.fromkeys(range(4), 2)
    with local_cluster([{}], dashboard=False, log=tmp_path / "theirs.log") as theirs:
        with existing_cluster(theirs.scheduler.address, log=tmp_path / "ours.log") as client:
            for made in ClusterRun(
                client, fake_shards.write, assignment, rows, lambda count: None
            ).results():
                assert writer.commit(made) > 0
        assert writer.missing == []
        assert theirs.submit(int, "7").result() == 7
        deadline = time.monotonic() + 10
        while theirs.run_on_scheduler(tasks_of) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert theirs.run_on_scheduler(tasks_of) == []


def test_a_scheduler_that_goes_away(tmp_path: Path) -> None:
    """A scheduler that ends during a run ends the run with an error of one line."""
    writer = begin(tmp_path / "cache", 2)
    assignment = json.dumps({"root": str(writer.root)})
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    command += ["--no-dashboard", "--scheduler-file", str(tmp_path / "scheduler.json")]
    with (
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as scheduler,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(
            scheduler.kill
        )  # always end the process, since leaving Popen's block waits for it
        address = ""
        while not address:
            assert scheduler.poll() is None
            with contextlib.suppress(OSError, json.JSONDecodeError):  # absent or incomplete
                address = json.loads((tmp_path / "scheduler.json").read_text())["address"]
            time.sleep(0.05)
        with existing_cluster(address, log=tmp_path / "log") as client:
            run = ClusterRun(
                client, fake_shards.write, assignment, {0: 2, 1: 2}, lambda count: None
            )
            results = run.results()
            scheduler.kill()
            with pytest.raises(
                ClusterError, match=r"^the Dask scheduler has gone away .*; what is committed stays"
            ):
                next(results)


def test_logging_is_as_before(tmp_path: Path) -> None:
    """A run restores the handlers of Dask's loggers."""
    before = [list(logging.getLogger(name).handlers) for name in connect.CHATTY]
    with connect._logged(tmp_path / "log"):
        logging.getLogger("distributed.scheduler").warning("%d workers", np.int64(3))
    assert [list(logging.getLogger(name).handlers) for name in connect.CHATTY] == before
    assert (tmp_path / "log").read_text().endswith("WARNING distributed.scheduler: 3 workers\n")
