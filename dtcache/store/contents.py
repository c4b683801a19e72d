"""The files that a cache should hold: those that manifest, shard index or commit records name."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from dtcache.atomic_files import TEMPORARY, is_system_file
from dtcache.errors import CacheDamagedError
from dtcache.hashing import file_problem
from dtcache.row_set import RowSet
from dtcache.samples import Column
from dtcache.store.commits import (
    CommitRecord,
    ShardObject,
    commit_files,
    is_commit,
    read_commit,
)
from dtcache.store.label_sets import label_sets_among
from dtcache.store.layout import (
    CLUSTER_LOG,
    COMMITS,
    DATA,
    FAILURES,
    IMAGES,
    LABELS,
    LOG,
    MANIFEST,
    SAMPLES,
    SHARDS,
    PayloadArray,
)
from dtcache.store.manifest import CacheManifest, read_manifest
from dtcache.store.parquet_tables import parquet_bytes, read_table
from dtcache.store.sample_index import SCHEMA, Keys, read_samples, require_record, sealed_samples
from dtcache.store.shard_index import MAX_DIGITS, read_objects

LOCK = ".lock"
MAX_UNLISTED = 1_000_000
"""Most shard files that are looked for if no index lists them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlace:
    """A sample that loses features because a file is damaged."""

    row: int
    key: str | None
    """None if samples.parquet is damaged."""
    view: int | None
    """The view that loses its features; None for all views."""


class SamplePlaces(Sequence[SamplePlace]):
    """The samples of a shard's rows or chunks, each made when it is read: there may be millions."""

    __slots__ = ("_entries", "_keys", "_rows", "_wanted")

    def __init__(
        self, wanted: "WantedObject", keys: Sequence[str] | None, entries: Sequence[int] | None
    ) -> None:
        """List the samples of `entries`, chunks by number in the index; None stands for all."""
        self._wanted = wanted
        self._keys = keys
        self._rows = wanted.array.rows_of(wanted.shard)
        self._entries = entries

    def __len__(self) -> int:
        """Return the number of samples, one per chunk if `entries` are given."""
        return len(self._rows if self._entries is None else self._entries)

    @overload
    def __getitem__(self, index: int) -> SamplePlace: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SamplePlace]: ...
    def __getitem__(self, index: int | slice) -> SamplePlace | Sequence[SamplePlace]:
        """Return one sample, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        view = None
        if self._entries is None:
            row = self._rows[index]
        else:
            inner, view = divmod(self._entries[index], self._wanted.array.payloads_per_row)
            row = self._rows[inner]
        return SamplePlace(
            row=row,
            key=self._keys[row] if self._keys is not None else None,
            view=None if self._wanted.array.name == IMAGES else view,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One file that is missing, or whose bytes differ from those that were written."""

    path: str
    """Relative to the cache folder."""
    reason: str
    array: str | None = None
    """images, or the features of a timestep, such as t150, if the file is a shard."""
    shard: int | None = None
    samples: Sequence[SamplePlace] = ()


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
    keys: Sequence[str] | None = None
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
    listed: Mapping[str, ShardObject] = {}
    records: dict[int, CommitRecord] = {}
    missing = set[int]()
    if manifest.state == "sealed":
        listed, damage = _listed(root, manifest)
    else:
        records, damage = _committed(root, manifest)
        listed = {o.path: o for record in records.values() for o in record.objects}
        written = {int(path.stem) for path in commit_files(root) if path.stem.isdecimal()}
        missing = set(range(manifest.num_shards)) - set(records) - written
    problem = samples_problem(root, manifest, records)
    keys = None
    if problem is None:
        try:
            keys = _keys(root, manifest)
        except CacheDamagedError as error:
            problem = _bare(root / SAMPLES, error)
    if keys is not None and manifest.state == "sealed":
        damage += _failures_damage(root, manifest)
    if problem is not None:
        damage.append(Damage(path=SAMPLES, reason=problem))
    is_listed = manifest.state == "writing" or listed
    if not is_listed and manifest.num_shards * len(manifest.arrays) > MAX_UNLISTED:
        return Contents(manifest=manifest, damage=tuple(damage))
    shards = sorted(set(range(manifest.num_shards)) - missing)
    return Contents(
        manifest=manifest,
        objects=tuple(
            _wanted(array, shard, listed.get(array.object_path(shard)))
            for shard in shards
            for array in manifest.arrays.values()
        ),
        missing=tuple(sorted(missing)),
        records=records,
        keys=keys,
        damage=tuple(damage),
    )


def _failures_damage(root: Path, manifest: CacheManifest) -> list[Damage]:
    """Return the damage of the failed rows of a sealed cache, whose sample index is undamaged."""
    problem = file_problem(root / FAILURES, manifest.files[FAILURES])
    if problem is None:
        try:
            read_samples(root, manifest)
        except CacheDamagedError as error:
            problem = _bare(root / FAILURES, error)
    return [Damage(path=FAILURES, reason=problem)] if problem is not None else []


def _listed(root: Path, manifest: CacheManifest) -> tuple[Mapping[str, ShardObject], list[Damage]]:
    """Return the shard files that the index of a sealed cache lists, by path.

    The second value is the damage of the index.
    """
    problem = file_problem(root / SHARDS, manifest.files.get(SHARDS))
    if problem is None:
        try:
            return read_objects(root, manifest), []
        except CacheDamagedError as error:
            problem = _bare(root / SHARDS, error)
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
            require_record(root, manifest, record)
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


def _keys(root: Path, manifest: CacheManifest) -> Sequence[str]:
    """Return the keys of an undamaged sample index. Raises CacheDamagedError."""
    path = root / SAMPLES
    if manifest.state == "writing" and file_problem(path, manifest.files.get(SAMPLES)) is not None:
        # The finished index of an interrupted seal, which the manifest does not describe yet.
        return Column[str](read_table(path, SCHEMA)["key"])
    rows = RowSet([0], [manifest.num_samples])
    return Keys(read_samples(root, manifest, with_failures=False).keys, rows)


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
        sealed = hashlib.sha256(parquet_bytes(table)).hexdigest()
        return None if file_problem(path, sealed) is None else problem
    except CacheDamagedError:
        return problem


def unnamed_files(names: Sequence[str], contents: Contents) -> dict[str, str]:
    """Return the unexpected files among the paths of a cache, each with a reason.

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
        named |= {name for name in names if is_commit(name)}
    missing = set(contents.missing)
    found = {}
    sets = tuple(f"{LABELS}/{name}/" for name in label_sets_among(names))
    for name in names:
        if name in named or name.startswith(sets):
            continue
        if any(is_system_file(part) for part in name.split("/")):
            continue
        if TEMPORARY in name:
            found[name] = "left by an interrupted run"
        elif _shard_of(contents.manifest, name) in missing:
            found[name] = "never committed; the next extraction writes it again"
        elif name in (SHARDS, FAILURES) or name.startswith(f"{COMMITS}/"):
            found[name] = "left by an interrupted seal; the next extraction finishes it"
        else:
            found[name] = "not part of the cache"
    return found


def _shard_of(manifest: CacheManifest, name: str) -> int | None:
    """Return the shard of a file of one of the arrays; None for another file."""
    folder, _, last = name.removeprefix(f"{DATA}/").rpartition("/")
    number = last.split(".")[1] if last.startswith("c.") else ""
    array = manifest.arrays.get(folder)
    if array is None or not number.isdecimal() or len(number) > MAX_DIGITS:
        return None
    return int(number) if array.object_path(int(number)) == name else None


def _bare(path: Path, error: Exception) -> str:
    return str(error).removeprefix(f"{path}: ")
