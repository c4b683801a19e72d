"""A shard runner without torch for tests of the cluster, which can be told to die or fail.

Its assignment is JSON: the cache's `root`, and how each attempt fails. Workers import this module.
"""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import zarr  # noqa: F401  (a worker that dies should not die while importing)

from dtcache.errors import ClusterError, DiskError
from dtcache.store.commits import CodecSums
from dtcache.store.manifest import CacheManifest, read_manifest
from dtcache.store.pending_shard import ShardData, WrittenShard, write_attempt
from dtcache.store.tag import TAG_BYTES


def planned(manifest: CacheManifest, shard: int) -> ShardData:
    """Return a shard's content, a pure function of its number."""
    rows = manifest.rows_of(shard)
    random_bytes = random.Random(shard)
    return ShardData(
        shard=shard,
        payloads={
            name: [
                random_bytes.randbytes(min(array.length - TAG_BYTES, 24))
                for _ in range(len(rows) * array.payloads_per_row)
            ]
            for name, array in manifest.arrays.items()
        },
        content_sha256=tuple(f"{row:064x}" for row in rows),
        failures=(),
        sums={
            name: CodecSums(squared_error=shard / 3, energy=shard + 0.1, section_bytes=shard)
            for name in manifest.tap_names
        },
    )


def write(assignment: str, shard: int, on_rows: Callable[[int], None]) -> WrittenShard:
    """Write a planned shard; die before, during or after it if the assignment says so."""
    told = json.loads(assignment)
    root = Path(told["root"])
    moment = random.random() / told.get("deaths", 1e-9)
    if moment < 0.3:
        os.kill(os.getpid(), signal.SIGKILL)
    manifest = read_manifest(root)
    made = write_attempt(root, manifest, planned(manifest, shard))
    if moment < 0.6:  # some of the files are written
        next(iter(made.temporaries(root))).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    on_rows(len(made.record.content_sha256))
    if moment < 0.8:  # all files are written, but the coordinator gets no result
        os.kill(os.getpid(), signal.SIGKILL)
    if moment < 1:  # all files are written just before the death
        os.posix_spawn("/bin/sh", ["sh", "-c", f"sleep 0.02; kill -9 {os.getpid()}"], os.environ)
    return made


def fail(assignment: str, shard: int, on_rows: Callable[[int], None]) -> WrittenShard:
    """Fail as the assignment says: `always`, in the `first` process only, for good, or by dying."""
    told = json.loads(assignment)
    root = Path(told["root"])
    if told["fails"] == "refused":
        raise ClusterError("it has torch 1.0, the coordinator 2.0")
    if told["fails"] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if told["fails"] == "always":
        raise MemoryError("no memory\nleft")
    first = root / ".tmp-first"
    try:
        first.touch(exist_ok=False)
        first.write_text(str(os.getpid()))
    except FileExistsError:
        pass
    if first.read_text() == str(os.getpid()):
        raise DiskError("cannot write: Stale file handle; check the disk and its permissions")
    return write(assignment, shard, on_rows)
