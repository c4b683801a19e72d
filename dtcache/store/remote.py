"""A cache in an object store: its small files are copied at once, its shards when they are used."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from dtcache.arguments import is_address, path_of
from dtcache.atomic_files import disk_errors, write_file
from dtcache.errors import CacheIncompleteError, CacheNotFoundError, StorageNotFoundError
from dtcache.hashing import file_problem
from dtcache.storage.local_copy import LocalCopies, LocalCopy, local_copies
from dtcache.storage.object_store import ObjectStore
from dtcache.store.commits import ShardObject
from dtcache.store.label_sets import label_set_root, label_sets_among, require_label_set
from dtcache.store.layout import DATA, LABELS, MANIFEST
from dtcache.store.manifest import MAX_MANIFEST_BYTES, read_manifest

REQUESTS = 16
"""Objects that are downloaded at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteCache:
    """A cache in an object store, and where its files are copied to."""

    address: str
    """Such as s3://bucket/cats.cache."""
    copies: LocalCopies

    def __str__(self) -> str:
        """Return the address."""
        return self.address


Location = Path | RemoteCache
"""Where a cache is."""


def location_of(name: str, cache: str | Path, copies: LocalCopies | None = None) -> Location:
    """Return where a cache is.

    Without `copies`, local copies are where the environment says, or in the user's cache. Raises
    ConfigError with the argument's name for another type.
    """
    if is_address(cache):
        return RemoteCache(address=str(cache), copies=copies or local_copies())
    return path_of(name, cache)


def folder_of(location: Location) -> Path:
    """Return the folder of a cache, or of its local copy with all files except the shards.

    Raises what `local_copy` raises.
    """
    return location if isinstance(location, Path) else local_copy(location).root


def local_copy(cache: RemoteCache) -> LocalCopy:
    """Return the local copy of a sealed cache, with all its files except the shards.

    Raises CacheNotFoundError, CacheIncompleteError for a cache that is not sealed,
    CacheDamagedError, StorageError, DiskError, and ConfigError for an address of another form.
    """
    store = ObjectStore(cache.address)
    try:
        manifest_bytes = store.read(MANIFEST, MAX_MANIFEST_BYTES)
    except StorageNotFoundError as error:
        raise CacheNotFoundError(f"{cache}: no cache there: {error}") from error
    # A cache that is written again has another manifest, hence another folder.
    copy = LocalCopy(store, hashlib.sha256(manifest_bytes).hexdigest(), cache.copies)
    with disk_errors(copy.root):
        copy.root.mkdir(parents=True, exist_ok=True)
    write_file(copy.root / MANIFEST, manifest_bytes)
    manifest = read_manifest(copy.root)
    if manifest.state != "sealed":
        raise CacheIncompleteError(
            f"{cache}: the cache is not complete; run its dtcache extract command again to finish "
            "it"
        )

    def fetch(name: str, sha256: str) -> None:
        if file_problem(copy.root / name, sha256) is not None:
            (copy.root / name).unlink(missing_ok=True)
        copy.fetch(name, sha256)

    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(fetch, *zip(*manifest.files.items(), strict=True)))
    return copy


def label_set_location(location: Location, name: str) -> Location:
    """Return where a label set of a cache is. Raises UnknownLabelsError with the existing names."""
    if isinstance(location, Path):
        return label_set_root(location, name)
    store = ObjectStore(location.address)
    require_label_set(str(location), name, label_sets_among(store.sizes(LABELS)))
    return replace(location, address=f"{store.address}/{LABELS}/{name}")


def damaged_remote_objects(copy: LocalCopy, objects: Mapping[str, ShardObject]) -> dict[str, str]:
    """Return the shards that the store lacks or has in another size, with their actual size.

    One request lists a thousand objects.
    """
    return differing_objects(copy.store.sizes(DATA), objects)


def differing_objects(
    sizes: Mapping[str, int], objects: Mapping[str, ShardObject]
) -> dict[str, str]:
    """Return the shards that are not among `sizes`, or have another size, with that size."""
    return {
        path: f"{sizes[path]} bytes" if path in sizes else "no object"
        for path, listed in objects.items()
        if sizes.get(path) != listed.size
    }


def fetch_shards(copy: LocalCopy, objects: Mapping[str, ShardObject], paths: list[str]) -> None:
    """Download the files of shards that are not copied yet, several at a time.

    Raises StorageError and DiskError.
    """
    if not paths:
        return
    with ThreadPoolExecutor(min(REQUESTS, len(paths))) as pool:
        list(
            pool.map(lambda path: copy.fetch(path, objects[path].sha256, objects[path].size), paths)
        )
