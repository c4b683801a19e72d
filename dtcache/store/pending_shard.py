"""Shard files on their way into a cache: any process may write them, one writer commits them."""

import contextlib
import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dtcache.atomic_files import TEMPORARY, temporary_path, write_temporary
from dtcache.recipe import FailedSample
from dtcache.store.commits import CodecSums, CommitRecord, EmptySample, ShardObject
from dtcache.store.layout import LABELS
from dtcache.store.manifest import CacheManifest
from dtcache.store.shard import build_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardData:
    """Everything that one shard holds. Each list has one entry per row, or per row and view."""

    shard: int
    payloads: dict[str, list[bytes]]
    """Payloads by array, without their tags; a payload is empty if the row's image failed."""
    content_sha256: tuple[str | None, ...]
    failures: tuple[FailedSample, ...]
    sums: dict[str, CodecSums]
    empty: tuple[EmptySample, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenShard:
    """A shard whose files are durable under temporary names. It is not yet part of the cache."""

    attempt: str
    """Part of the temporary file names that is unique to this attempt at the shard."""
    record: CommitRecord
    """The record to commit, with the files' final paths, sizes and hashes."""

    def temporaries(self, root: Path) -> dict[Path, Path]:
        """Return the final path of each file by its temporary path."""
        targets = [root / o.path for o in self.record.objects]
        return {temporary_path(target, self.attempt): target for target in targets}


def write_attempt(root: Path, manifest: CacheManifest, data: ShardData) -> WrittenShard:
    """Write a shard of the cache at `root` to temporary files.

    No lock is needed: any process may call this, any number of times. Raises DiskError after
    removing the files that were written.
    """
    attempt = secrets.token_hex(8)
    written = list[Path]()
    objects = []
    try:
        for name, array in manifest.arrays.items():
            content = build_shard(array, data.shard, data.payloads[name])
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
        empty=data.empty,
    )
    return WrittenShard(attempt=attempt, record=record)


def drop_temporaries(root: Path) -> None:
    """Remove every temporary file of a cache: those of interrupted runs and of abandoned workers.

    The caller holds the cache's lock. A worker that is still writing such a file cannot commit it
    afterwards. Temporary files of label sets stay, because label sets have their own locks.
    """
    temporaries = [
        path for path in root.rglob(f"{TEMPORARY}*") if path.relative_to(root).parts[0] != LABELS
    ]
    remove(path for path in temporaries if path.is_file())


def remove(paths: Iterable[Path]) -> None:
    """Remove files; one that cannot be removed is left to the next resume."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
