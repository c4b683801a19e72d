"""Compares shard files with their recorded SHA-256, which also says which shard a file is.

A file that differs is searched for damaged chunks, and for payloads of another place.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.storage.local_copy import LocalCopy
from dtcache.store.commits import ShardObject
from dtcache.store.layout import PayloadArray
from dtcache.store.open_files import Identity, OpenFile, OpenFiles
from dtcache.store.remote import fetch_shards
from dtcache.store.shard import ABSENT, index_bytes, parse_index, unpack_chunk
from dtcache.store.tag import untagged

TRIES = 3
"""Times that a copy is downloaded again if other processes delete it before it is opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How a shard file differs from the one that was written."""

    reason: str
    bad: dict[int, str] | None
    """By number in the index: the damage of each damaged chunk. None if no chunk can be found, and
    empty if every chunk is intact: then it is the file of another shard.
    """


def shard_difference(
    file: OpenFile,
    recorded_sha256: str | None,
    array: PayloadArray,
    shard: int,
    path_of: Callable[[str], str | None],
) -> Difference | None:
    """Read every byte of a shard file; return how it differs, or None if it is the recorded one.

    Without a recorded hash, only the checksums inside the file are compared. `path_of` gives the
    path of a recorded hash, so that a misplaced shard file is recognised. Raises
    CacheDamagedError if the disk fails.
    """
    got = file.sha256()
    if got == recorded_sha256:
        return None
    expected = f"expected SHA-256 {(recorded_sha256 or '')[:16]}..."
    other = path_of(got) if recorded_sha256 is not None else None
    if other is not None:
        return Difference(reason=f"{expected}, it is {other}", bad={})
    try:
        bad = bad_entries(file, array, shard)
    except CacheDamagedError as error:
        return Difference(reason=str(error), bad=None)
    if bad:
        reasons = ", ".join(dict.fromkeys(bad.values()))
        return Difference(reason=f"{len(bad)} of its chunks: {reasons}", bad=bad)
    if recorded_sha256 is None:
        return None
    return Difference(reason=f"{expected}, got {got[:16]}..., every chunk intact", bad={})


def bad_entries(file: OpenFile, array: PayloadArray, shard: int) -> dict[int, str]:
    """Return the damage of each damaged chunk of a shard, by its number in the index.

    Raises CacheDamagedError if the index itself is damaged, because no chunk can then be found.
    """
    entries = array.shard_rows * array.payloads_per_row
    size = file.identity.size
    tail = index_bytes(entries)
    index = parse_index(file.read(max(0, size - tail), tail), array, size)
    out = np.empty(array.length, np.uint8)
    first = array.rows_of(shard).start
    seed = array.tag_seed
    bad = {}
    for entry in range(len(array.rows_of(shard)) * array.payloads_per_row):
        inner, view = divmod(entry, array.payloads_per_row)
        offset, length = (int(value) for value in index[entry])
        try:
            if offset == ABSENT:
                raise CacheDamagedError("the shard holds no such chunk")
            unpack_chunk(file.read(offset, length), out)
            untagged(seed, first + inner, view, out)
        except CacheDamagedError as error:
            bad[entry] = str(error)
    return bad


@dataclass(frozen=True, kw_only=True, slots=True)
class _Check:
    """The result of comparing one shard file."""

    identity: Identity
    """The file that was read."""
    difference: Difference | None


class CheckedShards:
    """Shard files, each compared with its recorded SHA-256 when this process first opens it.

    A file that was closed and opened again is hashed again only if it was replaced or written to.
    Safe to share between threads.
    """

    def __init__(
        self,
        root: Path,
        objects: Mapping[str, ShardObject],
        most: int,
        copy: LocalCopy | None = None,
    ) -> None:
        """Open the files `objects` below `root`, at most `most` at a time.

        If `root` is the local `copy` of a cache in an object store, they are downloaded first, and
        a copy that differs is deleted.
        """
        self._root = root
        self._most = most
        self._copy = copy
        self._files = OpenFiles(root, most)
        self._objects = objects
        self._lock = threading.Lock()
        self._checks: dict[str, Future[_Check]] = {}

    def close(self) -> None:
        """Close the files; one that another thread is reading is closed when the read ends."""
        self._files = OpenFiles(self._root, self._most)

    def in_this_process(self) -> "CheckedShards":
        """Return the same files for a forked process: comparisons that have ended are kept."""
        again = CheckedShards(self._root, self._objects, self._most, self._copy)
        again._checks = {path: check for path, check in self._checks.items() if check.done()}
        return again

    def check(self, array: PayloadArray, shards: Iterable[int]) -> None:
        """Compare the files of some shards that this process has not compared yet.

        Several threads that call this share the work: each file is read by one of them. Raises
        CacheDamagedError, with the path, if a file cannot be read.
        """
        shared = []
        shards = list(shards)
        if self._copy is not None:
            fetch_shards(self._copy, self._objects, [array.object_path(n) for n in shards])
        for shard in shards:
            path = array.object_path(shard)
            with self._lock:
                check = self._checks.get(path)
                if check is None:
                    check = self._checks[path] = Future()
                    own = True
                else:
                    own = False
            if own:
                self._compare(path, array, shard, check)
            else:
                shared.append(check)
        for check in shared:
            check.result()

    def open(self, array: PayloadArray, shard: int) -> tuple[OpenFile, Difference | None]:
        """Return the open file of a shard, and how it differs from the one that was written.

        Raises CacheDamagedError, with the path, if the file cannot be read.
        """
        path = array.object_path(shard)
        file = self._opened(path)
        check = self._checks.get(path)
        if check is None or (check.done() and check.result().identity != file.identity):
            with self._lock:
                if self._checks.get(path) is check:
                    self._checks.pop(path, None)
            self.check(array, [shard])
            check = self._checks[path]
        return file, check.result().difference

    def _compare(self, path: str, array: PayloadArray, shard: int, check: "Future[_Check]") -> None:
        """Set the result of a check, which other threads may wait for."""
        try:
            file = self._opened(path)
            recorded = self._objects[path]
            difference = shard_difference(file, recorded.sha256, array, shard, self._path_of)
            if difference is not None and self._copy is not None:
                self._files.forget(path)
                (self._root / path).unlink(missing_ok=True)
                raise CacheDamagedError(
                    f"{self._root / path}: this local copy is damaged ({difference.reason}) and "
                    "was deleted; run the same command again, which downloads it"
                )
        except BaseException as error:
            with self._lock:
                del self._checks[path]  # the next read tries again
            check.set_exception(error)
            raise
        check.set_result(_Check(identity=file.identity, difference=difference))

    def _path_of(self, sha256: str) -> str | None:
        """Return the path of the file that has a recorded hash; None if there is no such file."""
        same = (path for path, listed in self._objects.items() if listed.sha256 == sha256)
        return next(same, None)

    def _opened(self, path: str) -> OpenFile:
        """Return an open file of the recorded size. Raises CacheDamagedError with the path."""
        listed = self._objects[path]
        try:
            file = self._files.open(path) if self._copy is None else self._copied(path, self._copy)
            if file.identity.size != listed.size:
                raise CacheDamagedError(f"expected {listed.size} bytes, got {file.identity.size}")
        except CacheDamagedError as error:
            raise CacheDamagedError(f"{self._root / path}: {error}; {AGAIN}") from error
        return file

    def _copied(self, path: str, copy: LocalCopy) -> OpenFile:
        """Return an open file, downloaded if there is no local copy of it."""
        listed = self._objects[path]
        for _ in range(TRIES):
            if not self._files.holds(path):
                copy.fetch(path, listed.sha256, listed.size)
            try:
                return self._files.open(path)
            except CacheDamagedError:
                # Another process deleted the copy to make room, before this one opened it.
                continue
        return self._files.open(path)
