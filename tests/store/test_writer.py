"""The writer commits exactly what it was given, refuses bad states and survives a full disk."""

import builtins
import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store.builders import FAILED_ROW, FEATURES, begin, tiny_plan, tree, write_cache

from dtcache import atomic_files as storage
from dtcache.atomic_files import FolderLock
from dtcache.errors import (
    CacheBusyError,
    CacheDamagedError,
    CacheError,
    CacheMismatchError,
    DiskError,
)
from dtcache.hashing import file_sha256, sha256_json
from dtcache.store.commits import read_commits, total_sums, write_commit
from dtcache.store.layout import CODEC
from dtcache.store.manifest import read_manifest
from dtcache.store.parquet_tables import parquet_bytes, read_table
from dtcache.store.sample_index import SCHEMA
from dtcache.store.shard_index import SHARD_SCHEMA
from dtcache.store.writer import CacheWriter, require_ours

pytestmark = pytest.mark.usefixtures("no_fsync")


def test_create_write_seal(tmp_path: Path) -> None:
    """A new cache misses all shards, then one fewer per write; the seal hashes all its files."""
    plan = tiny_plan()
    writer = begin(tmp_path, plan)
    assert writer.missing == [0, 1, 2]
    assert read_manifest(tmp_path).state == "writing"
    size = writer.write_shard(plan.shards[1])
    objects = [p for p in (tmp_path / "data.zarr").rglob("c.1*") if "codec" not in p.parts]
    assert len(objects) == 2
    assert size == sum(p.stat().st_size for p in objects)
    assert writer.missing == [0, 2]
    for shard in (2, 0):
        writer.write_shard(plan.shards[shard])
    assert writer.missing == []
    records = read_commits(tmp_path)
    writer.seal()
    assert not (tmp_path / "commits").exists()
    manifest = read_manifest(tmp_path)
    assert manifest.state == "sealed"
    assert manifest.sums == total_sums(records[s] for s in range(3))
    listed = {
        *manifest.files,
        *read_table(tmp_path / "shards.parquet", SHARD_SCHEMA)["path"].to_pylist(),
        "manifest.json",
    }
    assert listed == {
        p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()
    }
    assert all(file_sha256(tmp_path / name) == sha256 for name, sha256 in manifest.files.items())


def test_indices_hold_what_was_written(tmp_path: Path) -> None:
    """samples.parquet holds keys, labels, hashes and failures; shards.parquet sizes and hashes."""
    plan = tiny_plan()
    write_cache(tmp_path, plan)
    samples = read_table(tmp_path / "samples.parquet", SCHEMA).to_pydict()
    assert samples["key"] == [s.key for s in plan.samples]
    assert samples["label"] == [s.label for s in plan.samples]
    hashes = [h for shard in plan.shards for h in shard.content_sha256]
    assert samples["content_sha256"] == [bytes.fromhex(h) if h else None for h in hashes]
    assert [row for row, reason in enumerate(samples["failure"]) if reason] == [FAILED_ROW]
    for entry in read_table(tmp_path / "shards.parquet", SHARD_SCHEMA).to_pylist():
        path = tmp_path / entry["path"]
        assert (path.stat().st_size, file_sha256(path)) == (entry["bytes"], entry["sha256"])


def test_order_of_shards_changes_no_byte(tmp_path: Path) -> None:
    """Shards written in any order by several writers give the bytes of one ordered writer."""
    plan = tiny_plan()
    for shard in (2, 0, 1):
        begin(tmp_path / "a", plan).write_shard(plan.shards[shard])
    begin(tmp_path / "a", plan).seal()
    assert tree(tmp_path / "a") == tree(write_cache(tmp_path / "b", plan))


def test_order_of_arrays_changes_no_byte(tmp_path: Path) -> None:
    """Taps whose names sort differently from their strides give the same bytes after a resume."""
    plan = tiny_plan()
    plan = replace(plan, arrays=dict(reversed(plan.arrays.items())))
    begin(tmp_path / "a", plan).write_shard(plan.shards[0])
    assert tree(write_cache(tmp_path / "a", plan)) == tree(write_cache(tmp_path / "b", plan))


def test_writing_a_shard_again_changes_no_byte(tmp_path: Path) -> None:
    """Writing a shard a second time changes no byte."""
    plan = tiny_plan()
    writer = begin(tmp_path, plan)
    writer.write_shard(plan.shards[0])
    before = tree(tmp_path)
    writer.write_shard(plan.shards[0])
    assert tree(tmp_path) == before


def test_failures_are_known_before_and_after_sealing(tmp_path: Path) -> None:
    """Failures are reported from commit records, from the sealed index and after a partial seal."""
    plan = tiny_plan()
    writer = begin(tmp_path, plan)
    wanted = list(plan.shards[1].failures)
    assert writer.failures == []
    for data in plan.shards:
        writer.write_shard(data)
    assert writer.failures == wanted
    records = read_commits(tmp_path)
    writer.seal()
    assert writer.failures == wanted
    assert CacheWriter.resume(tmp_path).failures == wanted
    (tmp_path / "commits").mkdir()
    write_commit(tmp_path, records[2])  # killed while it deleted the records: two of three are gone
    assert CacheWriter.resume(tmp_path).failures == wanted


def test_seal_needs_every_shard(tmp_path: Path) -> None:
    """Sealing with missing shards raises and changes nothing."""
    writer = begin(tmp_path, tiny_plan())
    writer.write_shard(tiny_plan().shards[0])
    before = tree(tmp_path)
    with pytest.raises(CacheError, match="cannot seal, 2 shards are missing"):
        writer.seal()
    assert tree(tmp_path) == before


def test_sealed_cache_is_left_alone(tmp_path: Path) -> None:
    """Resuming and sealing a sealed cache changes no byte and finds no missing shard."""
    before = tree(write_cache(tmp_path, tiny_plan()))
    writer = CacheWriter.resume(tmp_path)
    assert writer.missing == []
    writer.seal()
    assert tree(tmp_path) == before


def test_resume_removes_what_was_never_committed(tmp_path: Path) -> None:
    """A resume removes temporary files and shards without a record, and keeps committed shards."""
    plan = tiny_plan()
    begin(tmp_path, plan).write_shard(plan.shards[0])
    wanted = tree(tmp_path)
    (tmp_path / "data.zarr" / FEATURES / "c.1.0.0").write_bytes(b"renamed, never committed")
    (tmp_path / "data.zarr" / FEATURES / ".tmp-c.2.0.0").write_bytes(b"half")
    (tmp_path / "commits" / ".tmp-000001.json").write_bytes(b"{")
    (tmp_path / ".tmp-manifest.json").write_bytes(b"")
    assert CacheWriter.resume(tmp_path).missing == [1, 2]
    assert tree(tmp_path) == wanted


def test_missing_or_short_committed_object_is_reported(tmp_path: Path) -> None:
    """A missing or resized committed file stops a resume with advice for a repair that works."""
    plan = tiny_plan()
    write_cache(tmp_path / "whole", plan)
    root = tmp_path / "cache"
    begin(root, plan).write_shard(plan.shards[0])
    path = root / "data.zarr" / FEATURES / "c.0.0.0"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    size = len(content)
    with pytest.raises(
        CacheDamagedError, match=rf"c\.0\.0\.0: expected {size} bytes, got {size - 1} bytes; delete"
    ):
        CacheWriter.resume(root)
    path.unlink()
    with pytest.raises(
        CacheDamagedError,
        match=rf"expected {size} bytes, got no file; delete .*000000.json and run",
    ):
        CacheWriter.resume(root)
    (root / "commits" / "000000.json").unlink()
    assert tree(write_cache(root, plan)) == tree(tmp_path / "whole")


def test_a_resume_removes_nothing_from_a_damaged_cache(tmp_path: Path) -> None:
    """A resume of a damaged cache stops before it removes or writes any file.

    The manifest from before the seal is one case: it names no commit records, so a resume that
    trusted it would delete every shard.
    """
    plan = tiny_plan()
    root = tmp_path / "cache"
    begin(root, plan)
    stale = (root / "manifest.json").read_bytes()
    begin(root, plan).write_shard(plan.shards[0])
    (root / "data.zarr" / FEATURES / "c.1.0.0").write_bytes(b"renamed, never committed")
    for name in ("data.zarr/zarr.json", CODEC, "samples.parquet"):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        before = tree(root)
        with pytest.raises(
            CacheDamagedError, match=rf"{name}: missing or not as the manifest says; run dtcache"
        ):
            CacheWriter.resume(root)
        assert tree(root) == before
        (root / name).write_bytes(content)
    write_cache(root, plan)
    (root / "manifest.json").write_bytes(stale)
    before = tree(root)
    with pytest.raises(
        CacheDamagedError, match=r"samples\.parquet: missing or not as the manifest says"
    ):
        CacheWriter.resume(root)
    assert tree(root) == before


def test_seal_refuses_samples_that_the_recipe_does_not_name(tmp_path: Path) -> None:
    """A seal refuses an intact samples.parquet with other keys than the recipe's."""
    plan = tiny_plan()
    writer = begin(tmp_path, plan)
    for data in plan.shards:
        writer.write_shard(data)
    table = read_table(tmp_path / "samples.parquet", SCHEMA)
    keys = ["another.png", *table["key"].to_pylist()[1:]]
    other = table.set_column(1, table.schema.field("key"), [keys])
    (tmp_path / "samples.parquet").write_bytes(parquet_bytes(other))
    with pytest.raises(
        CacheDamagedError,
        match=r"samples\.parquet: not the samples of the recipe; delete this",
    ):
        CacheWriter.resume(tmp_path).seal()
    assert read_manifest(tmp_path).state == "writing"


def test_commit_record_of_another_recipe_is_refused(tmp_path: Path) -> None:
    """A commit record with another fingerprint stops a resume, which names both fingerprints."""
    plan = tiny_plan()
    begin(tmp_path, plan).write_shard(plan.shards[0])
    record = read_commits(tmp_path)[0]
    write_commit(tmp_path, replace(record, fingerprint="0" * 64))
    wanted = (
        rf"000000.json: expected fingerprint {plan.recipe.fingerprint}, got 0{{64}}: the "
        rf"record belongs to another"
    )
    with pytest.raises(CacheMismatchError, match=wanted):
        CacheWriter.resume(tmp_path)


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    """A folder with unknown files is refused untouched; leftovers of a begun cache are accepted."""
    (tmp_path / ".lock").touch()
    (tmp_path / ".tmp-data.zarr").mkdir()
    require_ours(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        CacheMismatchError,
        match=r"not empty and not a cache: found notes.txt; pass an `out` that is new",
    ):
        begin(tmp_path, tiny_plan())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / ".tmp-data.zarr").is_dir()


def test_log_carries_its_checksum(tmp_path: Path) -> None:
    """extraction.log.json holds the given log and the log's hash."""
    writer = begin(tmp_path, tiny_plan())
    writer.write_log({"seconds": 1.5, "host": "somewhere"})
    found = json.loads((tmp_path / "extraction.log.json").read_bytes())
    assert found.pop("sha256") == sha256_json(found)
    assert found == {"seconds": 1.5, "host": "somewhere"}


class FullDisk:
    """An `open` whose n-th write runs out of space after half of its bytes."""

    def __init__(self, fail_at: int, code: int = errno.ENOSPC) -> None:
        self.fail_at = fail_at
        self.code = code
        self.writes = 0

    def open(self, path: Path, mode: str) -> Any:
        """Open a file whose write may fail."""
        return FullFile(self, path) if mode[0] in "wx" else builtins.open(path, mode)


class FullFile:
    """A file on a full disk."""

    def __init__(self, disk: FullDisk, path: Path) -> None:
        self._disk = disk
        self._file = builtins.open(path, "wb")  # noqa: SIM115

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        """Write `data`, or half of it and raise."""
        self._disk.writes += 1
        if self._disk.writes == self._disk.fail_at:
            self._file.write(data[: len(data) // 2])
            raise OSError(self._disk.code, os.strerror(self._disk.code))
        self._file.write(data)


def test_full_disk_while_laying_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk during the layout raises DiskError, and the next run starts again."""
    plan = tiny_plan()

    for fail_at in range(1, 7):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "open", FullDisk(fail_at).open, raising=False)
            with pytest.raises(
                DiskError,
                match=r"cannot write .*(zarr|codec|samples|manifest).* bytes.*free some space",
            ):
                begin(tmp_path / "a", plan)
        assert not (tmp_path / "a" / "manifest.json").exists()
    assert tree(write_cache(tmp_path / "a", plan)) == tree(write_cache(tmp_path / "b", plan))


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_full_disk_while_writing_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    """A full disk during a shard raises DiskError and commits nothing; the writer can retry."""
    plan = tiny_plan()
    writer = begin(tmp_path / "a", plan)
    writer.write_shard(plan.shards[0])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open", FullDisk(fail_at).open, raising=False)
        with pytest.raises(
            DiskError,
            match=r"cannot write .* \(\d+ bytes\): No space left on device; free some space",
        ):
            writer.write_shard(plan.shards[1])
    assert writer.missing == [1, 2]
    assert sorted(read_commits(tmp_path / "a")) == [0]
    if fail_at % 2:
        writer = CacheWriter.resume(tmp_path / "a")
    for shard in writer.missing:
        writer.write_shard(plan.shards[shard])
    writer.seal()
    assert tree(tmp_path / "a") == tree(write_cache(tmp_path / "b", plan))


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_full_disk_while_sealing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    """A full disk during a seal keeps all records, and a resume completes the seal."""
    plan = tiny_plan()
    writer = begin(tmp_path / "a", plan)
    for data in plan.shards:
        writer.write_shard(data)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open", FullDisk(fail_at).open, raising=False)
        with pytest.raises(
            DiskError, match="free some space and run the same command again: it resumes"
        ):
            writer.seal()
    assert read_manifest(tmp_path / "a").state == "writing"
    assert sorted(read_commits(tmp_path / "a")) == [0, 1, 2]
    assert tree(write_cache(tmp_path / "a", plan)) == tree(write_cache(tmp_path / "b", plan))


def test_failing_disk_gives_other_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO raises DiskError without advice about space, and a failed fsync removes the file."""
    writer = begin(tmp_path, tiny_plan())
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open", FullDisk(1, errno.EIO).open, raising=False)
        with pytest.raises(
            DiskError, match="Input/output error; check the disk and its permissions"
        ):
            writer.write_shard(tiny_plan().shards[0])
    calls = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DiskError, match="check the disk and its permissions"):
            writer.write_shard(tiny_plan().shards[0])
    assert len(calls) == 1
    assert not list(tmp_path.rglob(".tmp-*"))
    assert writer.missing == [0, 1, 2]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_any_failing_fsync_or_rename_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """After EIO at any fsync or rename, a resume or a retry still gives the exact bytes."""
    plan = tiny_plan()
    wanted = tree(write_cache(tmp_path / "undisturbed", plan))
    real = getattr(os, name)
    calls = 0
    fail_at = 0
    failed = True
    while failed:
        fail_at = fail_at + 1
        failed = False
        calls = 0
        root = tmp_path / f"{fail_at}"
        writer = begin(root, plan)

        def failing(*arguments: Any, fail_at: int = fail_at) -> Any:
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            try:
                writer.write_shard(plan.shards[0])
            except DiskError as error:
                failed = True
                assert "Input/output error; check the disk and its permissions" in str(error)
                assert writer.missing == [0, 1, 2]
        if fail_at % 2:
            writer = CacheWriter.resume(root)
        for shard in writer.missing:
            writer.write_shard(plan.shards[shard])
        writer.seal()
        assert tree(root) == wanted
    # Two arrays and a commit record, with one fsync per file and one per folder.
    assert fail_at == {"fsync": 6, "replace": 3}[name] + 1


def test_data_is_durable_before_its_commit_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and every folder is fsynced before the commit record is written."""
    plan = tiny_plan()
    writer = begin(tmp_path, plan)
    events: list[tuple[str, str]] = []
    real_fsync = os.fsync
    real_replace = os.replace

    def fsync(handle: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        real_fsync(handle)

    def rename(source: Path, target: Path) -> None:
        events.append(("rename", str(target)))
        real_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", rename)
        writer.write_shard(plan.shards[0])
    commit = str(tmp_path / "commits" / "000000.json")
    begun = events.index(("fsync", str(tmp_path / "commits" / ".tmp-000000.json")))
    synced = {name: place for place, (kind, name) in enumerate(events) if kind == "fsync"}
    for array in plan.arrays.values():
        target = tmp_path / array.object_path(0)
        renamed = events.index(("rename", str(target)))
        (temporary,) = (
            name
            for name in synced
            if re.fullmatch(rf"{target.parent}/\.tmp-\w+-{target.name}", name)
        )
        assert synced[temporary] < renamed
        assert any(event == ("fsync", str(target.parent)) for event in events[renamed:begun])
    assert begun < events.index(("rename", commit))
    assert events[-1] == ("fsync", str(tmp_path / "commits"))


_HOLDER = """
import subprocess, sys, time
from pathlib import Path
from dtcache.atomic_files import FolderLock
with FolderLock(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    print("held", child.pid, flush=True)
    time.sleep(60)
"""


def test_lock_admits_one_and_dies_with_its_process(tmp_path: Path) -> None:
    """A lock admits one holder, and SIGKILL of the holder frees the lock at once.

    A child process that outlives the holder does not keep the lock, even if it inherits open files.
    """
    folder = tmp_path / "new" / "cache"
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        held, child = holder.stdout.readline().split()
        assert held == "held"
        with pytest.raises(
            CacheBusyError,
            match="cache is being written by another process; wait for it or stop it",
        ):
            FolderLock(folder)
        holder.kill()
        holder.wait()
    with FolderLock(folder), pytest.raises(CacheBusyError, match="another process"):
        FolderLock(folder)
    os.kill(int(child), signal.SIGKILL)  # the child was alive until here
    with FolderLock(folder):
        pass


def test_lock_where_no_folder_can_be(tmp_path: Path) -> None:
    """A path below a file raises DiskError with that path."""
    (tmp_path / "file").touch()
    with pytest.raises(
        DiskError, match=r"cannot write .*file/cache: Not a directory; check the disk"
    ):
        FolderLock(tmp_path / "file" / "cache")
