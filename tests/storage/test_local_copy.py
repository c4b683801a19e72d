"""Local copies of objects: whole or absent, shared, within a limit."""

import hashlib
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from support.s3 import Bucket

from dtcache.errors import DiskError, StorageError, StorageNotFoundError
from dtcache.storage.local_copy import LocalCopies, LocalCopy

CONTENT = bytes(range(256)) * 8


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def copies(tmp_path: Path) -> LocalCopies:
    """A folder of copies for three objects of CONTENT's size."""
    return LocalCopies(folder=tmp_path / "copies", limit=3 * len(CONTENT))


@pytest.fixture
def copy(store: Bucket, copies: LocalCopies) -> LocalCopy:
    """A cache with five objects, none of them copied yet."""
    for number in range(5):
        store.put(f"data/c.{number}", CONTENT)
    return LocalCopy(store, "manifest", copies)


def fetch(copy: LocalCopy, number: int) -> Path:
    return copy.fetch(f"data/c.{number}", sha256(CONTENT), len(CONTENT))


def test_an_object_is_downloaded_once(copy: LocalCopy, store: Bucket) -> None:
    """The second use reads the local file, even if the object is gone."""
    assert fetch(copy, 0).read_bytes() == CONTENT
    store.delete(["data/c.0"])
    assert fetch(copy, 0).read_bytes() == CONTENT
    assert [path.name for path in copy.root.rglob("*") if path.is_file()] == ["c.0"]


def test_another_process_finds_the_copies(
    copy: LocalCopy, store: Bucket, copies: LocalCopies
) -> None:
    """A pickled copy has the same folder; a changed cache has another one."""
    fetch(copy, 0)
    store.delete(["data/c.0"])
    assert fetch(pickle.loads(pickle.dumps(copy)), 0).read_bytes() == CONTENT
    assert LocalCopy(store, "changed", copies).root != copy.root


def test_threads_share_one_download(
    copy: LocalCopy, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight threads that need an object at the same time download it once."""
    stream = store.stream
    names = []

    def slow(name: str):
        names.append(name)
        time.sleep(0.2)
        return stream(name)

    monkeypatch.setattr(copy.store, "stream", slow)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: fetch(copy, 0), range(8)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert names == ["data/c.0"]


def test_the_files_used_longest_ago_make_room(copy: LocalCopy) -> None:
    """Over the limit, the copy that was used the longest time ago goes, not the oldest download."""
    for number in range(3):
        os.utime(fetch(copy, number), (number, number))
    fetch(copy, 0)
    fetch(copy, 3)
    assert sorted(path.name for path in copy.root.rglob("*") if path.is_file()) == [
        "c.0",
        "c.2",
        "c.3",
    ]


def test_an_open_file_outlives_its_eviction(copy: LocalCopy) -> None:
    """A process that has a copy open reads it to the end after the copy was deleted."""
    with fetch(copy, 0).open("rb") as file:
        for number in range(1, 5):
            fetch(copy, number)
        assert not (copy.root / "data/c.0").exists()
        assert file.read() == CONTENT


def test_a_truncated_transfer_is_no_copy(copy: LocalCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the store sends fewer bytes, the error says so, and the next use downloads again."""
    with monkeypatch.context() as patch:
        patch.setattr(copy.store, "stream", lambda name: iter([CONTENT[:100]]))
        with pytest.raises(StorageError, match=r"/data/c\.0: expected 2048 bytes, got 100; the"):
            fetch(copy, 0)
        patch.setattr(copy.store, "stream", lambda name: iter([CONTENT, CONTENT]))
        with pytest.raises(StorageError, match=r"/data/c\.0: expected 2048 bytes, got 4096\+; the"):
            fetch(copy, 0)
    assert fetch(copy, 0).read_bytes() == CONTENT


def test_another_object_is_refused(copy: LocalCopy, store: Bucket) -> None:
    """An object of the right size with other bytes is refused by its SHA-256."""
    store.put("data/c.1", CONTENT[::-1])
    with pytest.raises(
        StorageError, match=r"/data/c\.1: expected SHA-256 [0-9a-f]{16}\.\.\., got "
    ):
        fetch(copy, 1)


def test_a_vanished_object_is_named(copy: LocalCopy, store: Bucket) -> None:
    """An object that is gone is an error that names it."""
    store.delete(["data/c.2"])
    with pytest.raises(StorageNotFoundError, match=r"/data/c\.2: no such object$"):
        fetch(copy, 2)


def test_what_a_killed_download_left_is_overwritten(copy: LocalCopy) -> None:
    """A temporary file of a killed process is in nobody's way."""
    folder = copy.root / "data"
    folder.mkdir(parents=True)
    (folder / ".tmp-c.0").write_bytes(CONTENT * 2)
    assert fetch(copy, 0).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["c.0"]


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_an_object_over_the_limit_is_refused(
    store: Bucket, copy: LocalCopy, copies: LocalCopies, size: int | None
) -> None:
    """An object that alone is over the limit is refused, with the option that raises it."""
    small = LocalCopy(store, "manifest", replace(copies, limit=100))
    with pytest.raises(DiskError, match=r"at most 100 bytes, .* pass a larger `local_cache_size`$"):
        small.fetch("data/c.0", sha256(CONTENT), size)
