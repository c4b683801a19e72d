"""Writing a cache shard by shard. After a kill at any moment, a resume gives the same bytes."""

import hashlib
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtcache.atomic_files import (
    TEMPORARY,
    is_system_file,
    make_folders,
    publish,
    require_no_links,
    write_file,
)
from dtcache.errors import AGAIN, CacheDamagedError, CacheError, CacheMismatchError
from dtcache.hashing import canonical_json, file_problem
from dtcache.json_files import with_own_hash
from dtcache.recipe import FailedSample, Json, Recipe, Sample
from dtcache.store.codec_file import codec_bytes
from dtcache.store.commits import (
    CommitRecord,
    EmptySample,
    commit_path,
    read_commits,
    total_sums,
    write_commit,
)
from dtcache.store.layout import (
    CLUSTER_LOG,
    CODEC,
    COMMITS,
    DATA,
    FAILURES,
    LOG,
    MANIFEST,
    PROMPT,
    SAMPLES,
    SHARDS,
    PayloadArray,
)
from dtcache.store.manifest import CacheManifest, new_manifest, read_manifest, write_manifest
from dtcache.store.parquet_tables import parquet_bytes, parts_of
from dtcache.store.pending_shard import (
    ShardData,
    WrittenShard,
    drop_temporaries,
    remove,
    write_attempt,
)
from dtcache.store.prompt_embedding import embedding_bytes
from dtcache.store.sample_index import (
    failed_samples,
    failures_table,
    read_samples,
    require_record,
    samples_table,
    sealed_samples,
)
from dtcache.store.shard_index import damaged_objects, read_objects, shards_table
from dtcache.store.zarr_nodes import zarr_nodes


class CacheWriter:
    """The only writer of a cache. Its creator must hold the cache's lock."""

    def __init__(self, root: Path, manifest: CacheManifest) -> None:
        """Resume the cache that `manifest` describes: read its commits, remove uncommitted files.

        Raises CacheDamagedError, before anything is removed, if a committed file is missing or
        another file is not the one that was written, and CacheMismatchError for records of another
        recipe.
        """
        require_no_links(root, folders_only=True)
        self.root = root
        self.manifest = manifest
        self._records = read_commits(root)
        self._check_files()
        if manifest.state == "sealed":
            objects = read_objects(root, manifest)
            for path, got in damaged_objects(root, objects).items():
                raise CacheDamagedError(
                    f"{root / path}: expected {objects[path].size} bytes, got {got}; {AGAIN}"
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
        """Create an empty cache, with the embedding of its teacher's prompt if there is one.

        The manifest is written last: without it the folder is not a cache. Raises
        CacheMismatchError if the folder holds other files, and DiskError.
        """
        require_ours(root)
        require_no_links(root, folders_only=True)
        if (root / DATA).exists():
            shutil.rmtree(root / DATA)
        (root / PROMPT).unlink(missing_ok=True)
        table = samples_table((s.key for s in samples), (s.label for s in samples))
        contents = {
            **zarr_nodes(arrays.values()),
            CODEC: codec_bytes(fit),
            SAMPLES: parquet_bytes(table),
        }
        if embedding_LD is not None:
            contents[PROMPT] = embedding_bytes(embedding_LD)
        make_folders(root / COMMITS)
        for name, content in contents.items():
            make_folders((root / name).parent)
            write_file(root / name, content)
        files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        parts = parts_of(io.BytesIO(contents[SAMPLES]))
        manifest = new_manifest(recipe, arrays, classes, files, parts)
        write_manifest(root, manifest)
        # Read back from disk, because JSON sorts names and commit records list files in that order.
        return cls.resume(root)

    @classmethod
    def resume(cls, root: Path) -> "CacheWriter":
        """Resume the cache at `root`."""
        return cls(root, read_manifest(root))

    @property
    def missing(self) -> list[int]:
        """Shards that are not committed yet."""
        if self.manifest.state == "sealed":
            return []
        return [shard for shard in range(self.manifest.num_shards) if shard not in self._records]

    @property
    def failures(self) -> list[FailedSample]:
        """Committed samples that have a row but no features, in row order."""
        if self.manifest.state == "writing":  # sealing deletes the records
            return [f for shard in sorted(self._records) for f in self._records[shard].failures]
        return failed_samples(read_samples(self.root, self.manifest, bounded=False))

    @property
    def empty(self) -> list[EmptySample]:
        """Committed samples whose images surely show nothing, in row order.

        A cache that was sealed before it was opened has no such record.
        """
        return [e for shard in sorted(self._records) for e in self._records[shard].empty]

    def content_sha256(self, row: int) -> str | None:
        """Return the SHA-256 of a row's source bytes; None if it failed or is not committed."""
        if self.manifest.state == "sealed":
            samples = read_samples(self.root, self.manifest, bounded=False)
            sha256 = samples.take([row])["content_sha256"][0].as_py()
            return sha256.hex() if sha256 is not None else None
        shard, index = divmod(row, self.manifest.shard_rows)
        return self._records[shard].content_sha256[index] if shard in self._records else None

    def write_shard(self, data: ShardData) -> int:
        """Write and commit one shard; return its bytes.

        Raises DiskError; then nothing is committed.
        """
        return self.commit(write_attempt(self.root, self.manifest, data))

    def commit(self, written: WrittenShard) -> int:
        """Make a written shard part of the cache and return its bytes.

        A shard that is already committed is dropped, and the result is 0. Raises CacheMismatchError
        for a shard of another cache, CacheError if its files are missing here, and DiskError. Then
        nothing is committed and the shard's files are removed.
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
                        f"{path}: expected the {o.size} bytes that were written for shard "
                        f"{record.shard}, got {'no file' if size is None else size}; check that "
                        "all workers share the cache's storage"
                    )
            publish(temporaries)
            write_commit(self.root, record)
        finally:
            remove(temporaries)
        self._records[record.shard] = record
        return sum(o.size for o in record.objects)

    def seal(self, measured: Json | None = None) -> None:
        """Finish the cache: write the indices, then the manifest, then delete the commit records.

        Safe to repeat after a kill. `measured` is recorded in the manifest of a label set.
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
                FAILURES: parquet_bytes(failures_table(samples)),
                SAMPLES: parquet_bytes(samples),
            }
            for name, content in contents.items():
                write_file(self.root / name, content)
            files = {
                name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
            }
            parts = parts_of(io.BytesIO(contents[SAMPLES]))
            self.manifest = self.manifest.sealed(files, parts, total_sums(records), measured)
            write_manifest(self.root, self.manifest)
        if (self.root / COMMITS).exists():
            shutil.rmtree(self.root / COMMITS)

    def write_log(self, log: dict[str, object]) -> None:
        """Write the extraction log, with its own hash.

        It is the only file that differs between two runs: it holds times, host and versions.
        """
        write_file(self.root / LOG, canonical_json(with_own_hash(log)))

    def _check_files(self) -> None:
        """Check all files except shards, so that a corrupted file is never resumed from or sealed.

        A kill during a seal may leave the new samples.parquet with the old manifest; sealing again
        writes both.
        """
        for name, sha256 in self.manifest.files.items():
            path = self.root / name
            half_sealed = name == SAMPLES and not self.missing and self.manifest.state == "writing"
            if file_problem(path, sha256) is not None and not (half_sealed and path.is_file()):
                raise CacheDamagedError(f"{path}: missing or not as the manifest says; {AGAIN}")

    def _drop_uncommitted(self) -> None:
        """Remove shards that were renamed but never committed."""
        committed = {o.path for record in self._records.values() for o in record.objects}
        for array in self.manifest.arrays.values():
            for path in (self.root / DATA / array.name).glob("c.*"):
                if path.relative_to(self.root).as_posix() not in committed:
                    path.unlink()

    def _require_ours(self, written: WrittenShard) -> None:
        """Check that a shard that another process describes belongs to this cache.

        This keeps every file outside the cache untouched.
        """
        record = written.record
        if self.manifest.record_problem(record) is not None or not written.attempt.isalnum():
            raise CacheMismatchError(
                f"{self.root}: shard {record.shard} belongs to another cache; it is not committed"
            )

    def _check(self, record: CommitRecord) -> None:
        if record.fingerprint != self.manifest.fingerprint:
            raise CacheMismatchError(
                f"{commit_path(self.root, record.shard)}: expected fingerprint "
                f"{self.manifest.fingerprint}, got {record.fingerprint}: the record belongs to "
                "another cache; delete it and extract again"
            )
        require_record(self.root, self.manifest, record)
        for o in record.objects:
            path = self.root / o.path
            if not path.is_file() or path.stat().st_size != o.size:
                got = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
                raise CacheDamagedError(
                    f"{path}: expected {o.size} bytes, got {got}; delete "
                    f"{commit_path(self.root, record.shard)} and run dtcache extract again to "
                    "write this shard again"
                )


def require_ours(root: Path) -> None:
    """Raise CacheMismatchError if a folder holds a file that no unfinished cache has."""
    known = {DATA, CODEC, COMMITS, SAMPLES, MANIFEST, LOG, CLUSTER_LOG, PROMPT, ".lock"}
    foreign = sorted(
        p.name
        for p in root.iterdir()
        if p.name not in known and not p.name.startswith(TEMPORARY) and not is_system_file(p.name)
    )
    if foreign:
        raise CacheMismatchError(
            f"{root} is not empty and not a cache: found {foreign[0]}; pass an `out` that is new "
            "or a cache"
        )
