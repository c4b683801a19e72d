"""An object store: objects of one folder, and errors of one line."""

import pickle

import pytest
from support.s3 import Bucket

from dtcache.errors import ConfigError, StorageError, StorageNotFoundError
from dtcache.storage import object_store
from dtcache.storage.object_store import ObjectStore


def test_objects_are_read_and_listed(store: Bucket) -> None:
    """An object is read whole or in parts, listed with its size, and gone once deleted."""
    store.put("a/one", b"first")
    store.put("a/one", b"second")
    store.put("two", b"x" * 3_000_000)
    assert store.read("a/one", 6) == b"second"
    assert b"".join(store.stream("two")) == b"x" * 3_000_000
    assert store.sizes() == {"a/one": 6, "two": 3_000_000}
    assert store.sizes("a") == {"a/one": 6}
    store.delete(["a/one"])
    assert store.sizes() == {"two": 3_000_000}


def test_a_pickled_store_is_the_same_folder(store: Bucket) -> None:
    """Another process that unpickles a store reads the same objects."""
    store.put("name", b"content")
    assert pickle.loads(pickle.dumps(store)).read("name", 7) == b"content"


def test_a_missing_object_is_named(store: Bucket) -> None:
    """A missing object is an error that names its address, read whole or in parts."""
    with pytest.raises(StorageNotFoundError, match=rf"^{store.address}/x: no such object$"):
        store.read("x", 1)
    with pytest.raises(StorageNotFoundError, match=r"/x: no such object$"):
        list(store.stream("x"))


def test_an_object_over_the_limit_is_refused(store: Bucket) -> None:
    """An object larger than its reader expects is refused by its header."""
    store.put("large", bytes(1000))
    with pytest.raises(StorageError, match=r"/large: expected at most 999 bytes, got 1000$"):
        store.read("large", 999)


def test_a_missing_bucket_is_named(store: Bucket) -> None:
    """Every request to a bucket that does not exist says so."""
    other = ObjectStore("s3://no-such-bucket/folder")
    for request in (
        lambda: other.read("x", 1),
        lambda: list(other.stream("x")),
        lambda: other.sizes(),
    ):
        with pytest.raises(StorageError, match=r"the bucket does not exist$"):
            request()


def test_a_server_that_is_away_is_one_line(store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that cannot be reached is an error of one line, without the client's debug text."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(object_store, "RETRIES", 0)
    with pytest.raises(StorageError, match=r"^s3://bucket/x: .*error sending request$"):
        ObjectStore("s3://bucket").read("x", 1)


@pytest.mark.parametrize(
    "address",
    ["s3://", "s3:///x", "ftp://host/x", "s3://bucket/a b", "s3://bucket/x?y", "s3://b#c"],
)
def test_other_addresses_are_refused(address: str) -> None:
    """An address without a bucket, of another scheme or with a query is refused."""
    with pytest.raises(ConfigError, match=r"expected an address such as s3://bucket/folder, gs://"):
        ObjectStore(address)


def test_more_objects_than_a_cache_has_are_not_listed(
    store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of any number of objects is refused before all of them are listed."""
    store.put("one", b"")
    store.put("two", b"")
    monkeypatch.setattr(object_store, "MAX_OBJECTS", 1)
    with pytest.raises(StorageError, match=r"expected at most 1 objects, got more; pass the addr"):
        store.sizes()


def test_without_obstore_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """If obstore is not installed, the error says how to install it."""
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"run: pip install 'dtcache\[cloud\]'$"):
        ObjectStore("s3://bucket/x")
