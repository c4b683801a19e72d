"""Writing a shard's files beside their places, in any process; only the cache's one writer makes them count."""

import contextlib
import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dtcache.atomic_files import TEMPORARY, temporary_path, write_temporary
from dtcache.recipe import FailedSample
from dtcache.store.commits import CodecSums, CommitRecord, ShardObject
from dtcache.store.layout import LABELS
from dtcache.store.manifest import CacheManifest
from dtcache.store.shard import build_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardData:
    """Everything that one shard holds; the lists run over its rows (times views, row by row)."""

    shard: int
    payloads: dict[str, list[bytes]]
    """Payloads by array; empty bytes where a row failed."""
    content_sha256: tuple[str | None, ...]
    failures: tuple[FailedSample, ...]
    sums: dict[str, CodecSums]


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenShard:
    """A shard whose files lie, durable, beside their places; it is no part of the cache before it is committed."""

    attempt: str
    """Part of the temporary files' names, which no other attempt at the shard shares."""
    record: CommitRecord
    """What is to be committed: the files' paths, sizes and hashes among it."""

    def temporaries(self, root: Path) -> dict[Path, Path]:
        """Return the places of the files by their temporary paths."""
        places = [root / o.path for o in self.record.objects]
        return {temporary_path(place, self.attempt): place for place in places}


def write_attempt(root: Path, manifest: CacheManifest, data: ShardData) -> WrittenShard:
    """Write a shard of the cache at `root` to temporary files; needs no lock, and may run anywhere any number of times.

    Raises DiskError, and leaves nothing then.
    """
    attempt = secrets.token_hex(8)
    written = list[Path]()
    objects = []
    try:
        for name, array in manifest.arrays.items():
            content = build_shard(
                data.payloads[name], array.length, array.shard_rows * array.payloads_per_row
            )
            path = array.object_path(data.shard)
            written.append(write_temporary(root / path, content, attempt))
            objects.append(
                ShardObject(
                    path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest()
                )
            )
    except BaseException:
        remove(written)
        raise
    record = CommitRecord(
        shard=data.shard,
        fingerprint=manifest.fingerprint,
        objects=tuple(objects),
        content_sha256=data.content_sha256,
        failures=data.failures,
        sums=data.sums,
    )
    return WrittenShard(attempt=attempt, record=record)


def drop_temporaries(root: Path) -> None:
    """Remove every temporary file of a cache: what runs that were cut short, or workers given up, have left.

    Whoever calls it holds the cache's lock; a worker that still writes one can then no longer commit it. Its label sets
    have locks of their own.
    """
    found = [
        path for path in root.rglob(f"{TEMPORARY}*") if path.relative_to(root).parts[0] != LABELS
    ]
    remove(path for path in found if path.is_file())


def remove(paths: Iterable[Path]) -> None:
    """Remove files that nobody waits for; one that cannot be removed is left to the next resume."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
