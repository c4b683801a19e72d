"""A cache in an object store reads as the same cache in a folder."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from store.builders import ROWS, begin, tiny_plan
from support.s3 import Bucket, environment, new_bucket, upload

from dtcache.errors import (
    CacheDamagedError,
    CacheIncompleteError,
    CacheNotFoundError,
    StorageError,
)
from dtcache.storage.local_copy import LocalCopies
from dtcache.store.layout import MANIFEST
from dtcache.store.reader import CacheReader
from dtcache.store.remote import RemoteCache


@pytest.fixture
def store(s3: str, monkeypatch: pytest.MonkeyPatch, tiny_cache: Path) -> Bucket:
    """The tiny cache in a bucket."""
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)
    store = Bucket(f"s3://{new_bucket(s3)}/tiny.cache")
    upload(tiny_cache, store)
    return store


@pytest.fixture
def remote(store: Bucket, tmp_path: Path) -> RemoteCache:
    """The tiny cache in a bucket, with room for local copies."""
    copies = LocalCopies(folder=tmp_path / "copies", limit=1 << 20)
    return RemoteCache(address=store.address, copies=copies)


def payloads(reader: CacheReader) -> dict[str, list[bytes]]:
    """Return every payload of a cache, by array."""
    return {
        name: [
            bytes(payload)
            for view in range(array.payloads_per_row)
            for payload in reader.payloads(name, np.arange(ROWS), np.full(ROWS, view))
        ]
        for name, array in reader.manifest.arrays.items()
    }


def test_every_payload_is_the_same(remote: RemoteCache, tiny_cache: Path) -> None:
    """Samples and payloads equal those of the local cache, also in another process."""
    local = CacheReader(tiny_cache)
    reader = CacheReader(remote)
    assert reader.samples.table() == local.samples.table()
    assert payloads(reader) == payloads(local)
    assert payloads(pickle.loads(pickle.dumps(reader))) == payloads(local)


def test_shards_are_downloaded_when_they_are_read(
    remote: RemoteCache, store: Bucket, tiny_cache: Path
) -> None:
    """Opening copies no shard; a shard that was read needs the store no more."""
    reader = CacheReader(remote)
    name, array = next(iter(reader.manifest.arrays.items()))
    assert not (reader.root / array.object_path(0)).exists()
    first = bytes(reader.payloads(name, [0], [0])[0])
    store.delete([path for path in store.sizes() if path != MANIFEST])
    assert bytes(reader.payloads(name, [0], [0])[0]) == first
    with pytest.raises(StorageError, match=r"no such object$"):
        reader.payloads(name, [ROWS - 1], [0])


def test_a_limit_smaller_than_the_cache_reads_it_all(remote: RemoteCache, tiny_cache: Path) -> None:
    """With room for a few shards only, every payload still comes."""
    largest = max(p.stat().st_size for p in tiny_cache.rglob("*") if p.is_file())
    copies = LocalCopies(folder=remote.copies.folder, limit=2 * largest)
    reader = CacheReader(RemoteCache(address=remote.address, copies=copies))
    assert payloads(reader) == payloads(CacheReader(tiny_cache))


def test_a_missing_shard_is_found_when_the_cache_is_opened(
    remote: RemoteCache, store: Bucket
) -> None:
    """A shard that is missing or of another size is found without reading a shard."""
    path = next(iter(CacheReader(remote).manifest.arrays.values())).object_path(0)
    store.put(path, b"short")
    with pytest.raises(CacheDamagedError, match=r"expected \d+ bytes, got 5 bytes"):
        CacheReader(remote)
    store.delete([path])
    with pytest.raises(CacheDamagedError, match=r"expected \d+ bytes, got no object"):
        CacheReader(remote)


def test_an_exchanged_shard_is_never_read(remote: RemoteCache, store: Bucket) -> None:
    """A shard of the right size with other bytes is refused by its SHA-256."""
    reader = CacheReader(remote)
    name, array = next(iter(reader.manifest.arrays.items()))
    path = array.object_path(0)
    content = store.read(path, 1 << 20)
    store.put(path, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StorageError, match=r"expected SHA-256 [0-9a-f]{16}\.\.\., got "):
        reader.payloads(name, [0], [0])


def test_no_cache_or_an_unfinished_one_is_refused(
    remote: RemoteCache, store: Bucket, tmp_path: Path
) -> None:
    """An empty folder, and a cache that is still being written, are refused in one line."""
    with pytest.raises(CacheNotFoundError, match=rf"^{store.address}/x: no cache there: "):
        CacheReader(RemoteCache(address=f"{store.address}/x", copies=remote.copies))
    begin(tmp_path / "begun", tiny_plan())
    upload(tmp_path / "begun", store)
    with pytest.raises(CacheIncompleteError, match=rf"^{store.address}: the cache is not complete"):
        CacheReader(remote)


def test_a_changed_local_copy_is_replaced(remote: RemoteCache, tiny_cache: Path) -> None:
    """If a small file's local copy was damaged, opening the cache downloads it again."""
    reader = CacheReader(remote)
    (reader.root / "samples.parquet").write_bytes(b"damaged")
    assert CacheReader(remote).samples.table().equals(reader.samples.table())


def test_a_damaged_shard_copy_is_deleted(remote: RemoteCache, tiny_cache: Path) -> None:
    """A local copy whose bytes changed is never used; the next read downloads it again."""
    name, array = next(iter(CacheReader(remote).manifest.arrays.items()))
    CacheReader(remote).payloads(name, [0], [0])
    path = CacheReader(remote).root / array.object_path(0)
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    reader = CacheReader(remote)
    with pytest.raises(CacheDamagedError, match=r"this local copy is damaged \(.*\) and was delet"):
        reader.payloads(name, [0], [0])
    expected = bytes(CacheReader(tiny_cache).payloads(name, [0], [0])[0])
    assert bytes(reader.payloads(name, [0], [0])[0]) == expected
