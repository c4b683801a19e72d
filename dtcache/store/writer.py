"""Writing a cache shard by shard, so that a kill at any moment leaves something that resumes to the same bytes."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtcache.atomic_files import TEMPORARY, disk_errors, fsync_tree, publish, write_file
from dtcache.errors import AGAIN, CacheDamagedError, CacheError, CacheMismatchError
from dtcache.hashing import canonical_json, file_sha256, with_own_hash
from dtcache.recipe import FailedSample, Json, Recipe, Sample
from dtcache.store.commits import CommitRecord, commit_path, read_commits, total_sums, write_commit
from dtcache.store.layout import (
    CLUSTER_LOG,
    COMMITS,
    DATA,
    LOG,
    MANIFEST,
    PROMPT,
    SAMPLES,
    SHARDS,
    PayloadArray,
)
from dtcache.store.manifest import CacheManifest, new_manifest, read_manifest, write_manifest
from dtcache.store.pending_shard import (
    ShardData,
    WrittenShard,
    drop_temporaries,
    remove,
    write_attempt,
)
from dtcache.store.prompt_embedding import embedding_bytes
from dtcache.store.sample_index import (
    damaged_objects,
    parquet_bytes,
    read_failures,
    read_objects,
    read_table,
    require_rows,
    samples_table,
    sealed_samples,
    shards_table,
)
from dtcache.store.zarr_nodes import write_zarr_nodes


class CacheWriter:
    """The one writer of a cache; whoever makes it holds the cache's lock."""

    def __init__(self, root: Path, manifest: CacheManifest) -> None:
        """Go on with the cache that `manifest` describes: drop leftovers of a killed run, read what is committed.

        Raises CacheDamagedError where a committed file is gone or another file is not as written, before anything is
        removed, and CacheMismatchError for records of another recipe.
        """
        self.root = root
        self.manifest = manifest
        self._records = read_commits(root)
        self._check_files()
        if manifest.state == "sealed":
            sizes = {path: size for path, size, _ in read_objects(root)}
            for path, got in damaged_objects(root, sizes).items():
                raise CacheDamagedError(
                    f"{root / path}: expected {sizes[path]} bytes, got {got}; {AGAIN}"
                )
        else:
            self._drop_uncommitted()
        drop_temporaries(self.root)
        for record in self._records.values():
            self._check(record)

    @classmethod
    def create(
        cls,
        root: Path,
        recipe: Recipe,
        arrays: dict[str, PayloadArray],
        fit: Mapping[str, Mapping[str, NDArray[np.generic]]],
        samples: Sequence[Sample],
        classes: list[str] | None,
        embedding_LD: NDArray[np.float32] | None = None,
    ) -> "CacheWriter":
        """Lay out an empty cache, with the embedding of its teacher's prompt where there is one.

        The manifest comes last: without it the folder is not a cache.
        """
        require_ours(root)
        for leftover in (root / DATA, root / f"{TEMPORARY}{DATA}"):
            if leftover.exists():
                shutil.rmtree(leftover)
        (root / PROMPT).unlink(missing_ok=True)
        (root / COMMITS).mkdir(exist_ok=True)
        nodes = root / f"{TEMPORARY}{DATA}"
        with disk_errors(nodes):
            write_zarr_nodes(nodes, arrays, fit)
        fsync_tree(nodes)
        publish({nodes: root / DATA})
        files = {
            p.relative_to(root).as_posix(): file_sha256(p)
            for p in sorted((root / DATA).rglob("*"))
            if p.is_file()
        }
        table = samples_table((s.key for s in samples), (s.label for s in samples))
        write_file(root / SAMPLES, parquet_bytes(table))
        files[SAMPLES] = file_sha256(root / SAMPLES)
        if embedding_LD is not None:
            write_file(root / PROMPT, embedding_bytes(embedding_LD))
            files[PROMPT] = file_sha256(root / PROMPT)
        manifest = new_manifest(recipe, arrays, classes, files)
        write_manifest(root, manifest)
        # As a resume reads it: commit records list objects in the manifest's order, which JSON sorts by name.
        return cls.resume(root)

    @classmethod
    def resume(cls, root: Path) -> "CacheWriter":
        """Go on with a cache that was begun earlier."""
        return cls(root, read_manifest(root))

    @property
    def missing(self) -> list[int]:
        """Shards that are not committed yet."""
        if self.manifest.state == "sealed":
            return []
        return [shard for shard in range(self.manifest.num_shards) if shard not in self._records]

    @property
    def failures(self) -> list[FailedSample]:
        """Samples that have a row but no features, in row order, of everything committed."""
        if self.manifest.state == "writing":  # a sealed cache may have lost some of its records
            return [f for shard in sorted(self._records) for f in self._records[shard].failures]
        return read_failures(self.root / SAMPLES)

    def content_sha256(self, row: int) -> str | None:
        """Return the SHA-256 of a committed row's source bytes; None where it failed or is not committed."""
        if self.manifest.state == "sealed":
            found = read_table(self.root / SAMPLES)["content_sha256"][row].as_py()
            return found.hex() if found is not None else None
        shard, place = divmod(row, self.manifest.shard_rows)
        return self._records[shard].content_sha256[place] if shard in self._records else None

    def write_shard(self, data: ShardData) -> int:
        """Write and commit one shard; return its bytes. Raises DiskError; nothing is committed then."""
        return self.commit(write_attempt(self.root, self.manifest, data))

    def commit(self, written: WrittenShard) -> int:
        """Make a written shard part of the cache and return its bytes; 0, and its files go, where it is one already.

        Raises CacheMismatchError for a shard that is none of this cache, CacheError where its files are not here, and
        DiskError; nothing is committed then, and its files go.
        """
        record = written.record
        self._require_ours(written)
        temporaries = written.temporaries(self.root)
        try:
            if record.shard not in self.missing:
                return 0
            for path, o in zip(temporaries, record.objects, strict=True):
                size = path.stat().st_size if path.is_file() else None
                if size != o.size:
                    raise CacheError(
                        f"{path}: expected the {o.size} bytes that were written for shard {record.shard}, got "
                        f"{'no file' if size is None else size}; see that all workers share the cache's storage"
                    )
            publish(temporaries)
            write_commit(self.root, record)
        finally:
            remove(temporaries)
        self._records[record.shard] = record
        return sum(o.size for o in record.objects)

    def seal(self, measured: Json | None = None) -> None:
        """Finish the cache: indices, then the manifest, then the commit records go. Safe to repeat after a kill.

        The manifest of a label set records what was `measured` on it.
        """
        if self.manifest.state == "writing":
            if self.missing:
                raise CacheError(
                    f"{self.root}: cannot seal, {len(self.missing)} shards are missing"
                )
            records = [self._records[shard] for shard in sorted(self._records)]
            samples = sealed_samples(
                self.root / SAMPLES, self.manifest.recipe["samples_sha256"], records
            )
            contents = {
                SHARDS: parquet_bytes(
                    shards_table((r.shard, o) for r in records for o in r.objects)
                ),
                SAMPLES: parquet_bytes(samples),
            }
            for name, content in contents.items():
                write_file(self.root / name, content)
            files = {
                name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
            }
            self.manifest = self.manifest.sealed(files, total_sums(records), measured)
            write_manifest(self.root, self.manifest)
        if (self.root / COMMITS).exists():
            shutil.rmtree(self.root / COMMITS)

    def write_log(self, log: dict[str, object]) -> None:
        """Write the one volatile file (times, host, versions), with its own checksum."""
        write_file(self.root / LOG, canonical_json(with_own_hash(log)))

    def _check_files(self) -> None:
        """Check all files but shards, so that nothing is computed from, or sealed with, a byte that nobody wrote.

        A kill between samples.parquet and the manifest of a seal leaves the new one of the two: it is written anew.
        """
        for name, sha256 in self.manifest.files.items():
            path = self.root / name
            half_sealed = name == SAMPLES and not self.missing and self.manifest.state == "writing"
            if not path.is_file() or (file_sha256(path) != sha256 and not half_sealed):
                raise CacheDamagedError(f"{path}: missing or not as the manifest says; {AGAIN}")

    def _drop_uncommitted(self) -> None:
        """Remove shards that were renamed but never committed."""
        committed = {o.path for record in self._records.values() for o in record.objects}
        for array in self.manifest.arrays.values():
            for path in (self.root / DATA / array.name).glob("c.*"):
                if path.relative_to(self.root).as_posix() not in committed:
                    path.unlink()

    def _require_ours(self, written: WrittenShard) -> None:
        """Check that a shard that another process describes is one of this cache, so that no other path is touched."""
        record = written.record
        paths = [array.object_path(record.shard) for array in self.manifest.arrays.values()]
        if (
            record.fingerprint != self.manifest.fingerprint
            or [o.path for o in record.objects] != paths
            or self.manifest.rows_problem(record) is not None
            or not written.attempt.isalnum()
        ):
            raise CacheMismatchError(
                f"{self.root}: shard {record.shard} was made for another cache; it is not committed"
            )

    def _check(self, record: CommitRecord) -> None:
        if record.fingerprint != self.manifest.fingerprint:
            raise CacheMismatchError(
                f"{commit_path(self.root, record.shard)}: expected fingerprint {self.manifest.fingerprint}, got "
                f"{record.fingerprint}: the record belongs to another cache; delete it and extract again"
            )
        require_rows(self.root, self.manifest, record)
        for o in record.objects:
            path = self.root / o.path
            if not path.is_file() or path.stat().st_size != o.size:
                got = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
                raise CacheDamagedError(
                    f"{path}: expected {o.size} bytes, got {got}; delete {commit_path(self.root, record.shard)} "
                    "and run the extraction again to write this shard anew"
                )


def require_ours(root: Path) -> None:
    """Raise CacheMismatchError where a folder holds anything that a begun cache would not."""
    known = {DATA, COMMITS, SAMPLES, MANIFEST, LOG, CLUSTER_LOG, PROMPT, ".lock"}
    foreign = sorted(
        p.name for p in root.iterdir() if p.name not in known and not p.name.startswith(TEMPORARY)
    )
    if foreign:
        raise CacheMismatchError(
            f"{root} is not empty and not a cache: found {foreign[0]}; give an --out that is new or a cache"
        )
