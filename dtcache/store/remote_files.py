"""The files of a cache in an object store as `verify` checks them: the store's bytes, no copies.

The files that hold no shard are downloaded into a temporary folder, a shard for as long as it is
checked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dtcache.atomic_files import disk_errors, make_folders
from dtcache.errors import (
    CacheDamagedError,
    CacheFormatError,
    CacheNotFoundError,
    StorageError,
    StorageNotFoundError,
)
from dtcache.storage.object_store import ObjectStore
from dtcache.store.commits import MAX_COMMIT_BYTES, is_commit
from dtcache.store.layout import LOG, MANIFEST, MAX_LOG_BYTES
from dtcache.store.manifest import MAX_MANIFEST_BYTES, CacheManifest, read_manifest
from dtcache.store.remote import RemoteCache


class RemoteFiles:
    """The files of a cache in an object store, listed once."""

    def __init__(self, cache: RemoteCache, root: Path) -> None:
        """List the objects; download all except shards and label sets to the folder `root`.

        Raises CacheNotFoundError without a manifest, and StorageError.
        """
        self.root = root
        self._store = ObjectStore(cache.address)
        self._sizes = self._store.sizes()
        if MANIFEST not in self._sizes:
            raise CacheNotFoundError(f"{cache}: no cache there: it has no {MANIFEST}")
        try:
            named = set(self.manifest().files)
        except (CacheDamagedError, CacheFormatError):
            return  # read_contents reports it
        for name in self._sizes:
            if name in named:
                self._download(name, self._sizes[name])
            elif name == LOG or is_commit(name):
                self._download(name, MAX_LOG_BYTES if name == LOG else MAX_COMMIT_BYTES)

    def size(self, path: str) -> int | None:
        """Return the bytes of an object; None if there is none."""
        return self._sizes.get(path)

    @contextmanager
    def at_hand(self, path: str) -> Iterator[Path]:
        """Download a shard file, and remove it at the end. Raises CacheDamagedError, StorageError.

        An object that vanished since it was listed is damage.
        """
        try:
            self._download(path, self._sizes[path])
            yield self.root
        except StorageNotFoundError as error:
            raise CacheDamagedError("no file") from error
        finally:
            (self.root / path).unlink(missing_ok=True)

    def manifest(self) -> CacheManifest:
        """Return the manifest as it is now."""
        self._download(MANIFEST, MAX_MANIFEST_BYTES)
        return read_manifest(self.root)

    def names(self) -> list[str]:
        """Return the paths of all objects, in order."""
        return sorted(self._sizes)

    def _download(self, name: str, limit: int) -> None:
        """Write an object to its file. Raises StorageError for one of more than `limit` bytes."""
        target = self.root / name
        make_folders(target.parent)
        received = 0
        with disk_errors(target), open(target, "wb") as file:
            for part in self._store.stream(name):
                received += len(part)
                if received > limit:
                    raise StorageError(
                        f"{self._store.address}/{name}: expected at most {limit} bytes, got more; "
                        "the object is being replaced: try again"
                    )
                file.write(part)


@contextmanager
def remote_files(cache: RemoteCache) -> Iterator[RemoteFiles]:
    """Yield the files of a cache in an object store; their temporary folder is removed at the end.

    The folder lies beside the local copies, but does not count for their limit.
    """
    make_folders(cache.copies.folder)
    with TemporaryDirectory(prefix="verify-", dir=cache.copies.folder) as folder:
        yield RemoteFiles(cache, Path(folder))
