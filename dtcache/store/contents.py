"""The files that a cache should hold: those that manifest, shard index or commit records name."""

from dataclasses import dataclass, field
from pathlib import Path

from dtcache.atomic_files import TEMPORARY, is_system_file
from dtcache.errors import CacheDamagedError
from dtcache.hashing import file_problem
from dtcache.store.commits import CommitRecord, ShardObject, commit_files, read_commit
from dtcache.store.label_sets import label_set_names
from dtcache.store.layout import (
    CLUSTER_LOG,
    COMMITS,
    LABELS,
    LOG,
    MANIFEST,
    SAMPLES,
    SHARDS,
    PayloadArray,
)
from dtcache.store.manifest import CacheManifest, read_manifest
from dtcache.store.sample_index import (
    parquet_bytes,
    read_objects,
    read_table,
    require_rows,
    sealed_samples,
)

LOCK = ".lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlace:
    """A sample that loses features because a file is damaged."""

    row: int
    key: str | None
    """None if samples.parquet is damaged."""
    view: int | None
    """The view that loses its features; None for all views."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One file that is missing, or whose bytes differ from those that were written."""

    path: str
    """Relative to the cache folder."""
    reason: str
    array: str | None = None
    """images, or a tap such as t150/stride8, if the file is a shard."""
    shard: int | None = None
    samples: tuple[SamplePlace, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedObject:
    """A shard file that the cache should hold."""

    path: str
    array: PayloadArray
    shard: int
    size: int | None
    """Bytes; None if the record is damaged. Then only the checksums inside the file are left."""
    sha256: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """Everything that a cache should hold, as far as its undamaged files show."""

    manifest: CacheManifest | None
    """None if the manifest is damaged; then nothing else is known."""
    objects: tuple[WantedObject, ...] = ()
    """In shard order."""
    missing: tuple[int, ...] = ()
    """Shards that were never committed."""
    records: dict[int, CommitRecord] = field(default_factory=dict)
    """Commit records by shard, while the cache is being written."""
    keys: tuple[str, ...] | None = None
    """Sample keys by row; None if samples.parquet is damaged."""
    damage: tuple[Damage, ...] = ()
    """Damage of the manifest, shard index, sample index and commit records."""

    @property
    def sealed(self) -> bool:
        """Whether the cache is finished."""
        return self.manifest is not None and self.manifest.state == "sealed"


def read_contents(root: Path) -> Contents:
    """Read which files a cache should hold, finished or not.

    Raises CacheNotFoundError if there is no cache, and CacheFormatError if a newer dtcache wrote
    it.
    """
    try:
        manifest = read_manifest(root)
    except CacheDamagedError as error:
        return Contents(
            manifest=None, damage=(Damage(path=MANIFEST, reason=_bare(root / MANIFEST, error)),)
        )
    records: dict[int, CommitRecord] = {}
    shards = set(range(manifest.num_shards))
    if manifest.state == "sealed":
        listed, damage, missing = *_listed(root, manifest), set()
    else:
        records, damage = _committed(root, manifest)
        listed = {o.path: o for record in records.values() for o in record.objects}
        missing = (
            shards
            - set(records)
            - {int(path.stem) for path in commit_files(root) if path.stem.isdecimal()}
        )
    problem = samples_problem(root, manifest, records)
    if problem:
        damage.append(Damage(path=SAMPLES, reason=problem))
    return Contents(
        manifest=manifest,
        objects=tuple(
            _wanted(array, shard, listed.get(array.object_path(shard)))
            for shard in sorted(shards - missing)
            for array in manifest.arrays.values()
        ),
        missing=tuple(sorted(missing)),
        records=records,
        keys=None if problem else tuple(read_table(root / SAMPLES)["key"].to_pylist()),
        damage=tuple(damage),
    )


def _listed(root: Path, manifest: CacheManifest) -> tuple[dict[str, ShardObject], list[Damage]]:
    """Return the shard files that the index of a sealed cache lists, by path.

    The second value is the damage of the index.
    """
    problem = file_problem(root / SHARDS, manifest.files.get(SHARDS))
    if problem is None:
        listed = {
            path: ShardObject(path=path, size=size, sha256=sha)
            for path, size, sha in read_objects(root)
        }
        wanted = {
            array.object_path(s)
            for array in manifest.arrays.values()
            for s in range(array.num_shards)
        }
        if listed.keys() == wanted:
            return listed, []
        problem = (
            "expected one row per shard and array, got a difference at "
            f"{min(listed.keys() ^ wanted)}"
        )
    return {}, [Damage(path=SHARDS, reason=problem)]


def _committed(root: Path, manifest: CacheManifest) -> tuple[dict[int, CommitRecord], list[Damage]]:
    """Return the valid commit records of an unfinished cache by shard.

    The second value is the damage of the other records.
    """
    records = {}
    damage = []
    for path in commit_files(root):
        try:
            record = read_commit(path)
            wanted = {array.object_path(record.shard) for array in manifest.arrays.values()}
            if (
                record.fingerprint != manifest.fingerprint
                or {o.path for o in record.objects} != wanted
            ):
                raise CacheDamagedError(f"{path}: the record belongs to another cache")
            require_rows(root, manifest, record)
        except CacheDamagedError as error:
            damage.append(Damage(path=path.relative_to(root).as_posix(), reason=_bare(path, error)))
        else:
            records[record.shard] = record
    return records, damage


def _wanted(array: PayloadArray, shard: int, listed: ShardObject | None) -> WantedObject:
    size, sha256 = (listed.size, listed.sha256) if listed is not None else (None, None)
    return WantedObject(
        path=array.object_path(shard), array=array, shard=shard, size=size, sha256=sha256
    )


def samples_problem(
    root: Path, manifest: CacheManifest, records: dict[int, CommitRecord]
) -> str | None:
    """Return the damage of samples.parquet, or None if it matches the manifest.

    While the cache is being written, the file may already be the finished index that the commit
    records give, byte for byte.
    """
    path = root / SAMPLES
    problem = file_problem(path, manifest.files.get(SAMPLES))
    all_there = len(records) == manifest.num_shards
    if problem is None or manifest.state == "sealed" or not all_there:
        return problem
    try:
        table = sealed_samples(
            path, manifest.recipe["samples_sha256"], [r for _, r in sorted(records.items())]
        )
        return None if parquet_bytes(table) == path.read_bytes() else problem
    except CacheDamagedError:
        return problem


def unnamed_files(root: Path, contents: Contents) -> dict[str, str]:
    """Return the unexpected files in a cache's folder, each with a reason.

    These are the files that neither the cache nor one of its label sets names.
    """
    if contents.manifest is None:
        return {}
    named = {
        MANIFEST,
        LOG,
        CLUSTER_LOG,
        LOCK,
        *contents.manifest.files,
        *(o.path for o in contents.objects),
    }
    if not contents.sealed:
        named |= {path.relative_to(root).as_posix() for path in commit_files(root)}
    uncommitted = {
        array.object_path(s)
        for array in contents.manifest.arrays.values()
        for s in contents.missing
    }
    found = {}
    sets = tuple(f"{LABELS}/{name}/" for name in label_set_names(root))
    for path in sorted(p for p in root.rglob("*") if p.is_symlink() or not p.is_dir()):
        name = path.relative_to(root).as_posix()
        if name in named or name.startswith(sets):
            continue
        if any(is_system_file(part) for part in path.relative_to(root).parts):
            continue
        if TEMPORARY in name:
            found[name] = "left by an interrupted run"
        elif name in uncommitted:
            found[name] = "never committed; the next extraction writes it again"
        elif (name == SHARDS) or name.startswith(f"{COMMITS}/"):
            found[name] = "left by an interrupted seal; the next extraction finishes it"
        else:
            found[name] = "not part of the cache"
    return found


def _bare(path: Path, error: Exception) -> str:
    return str(error).removeprefix(f"{path}: ")
