"""Locks and fsyncs on file systems that lack them, and files that belong to nobody."""

import errno
import fcntl
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from store.builders import begin, tiny_plan
from support.cli import run

from dtcache.atomic_files import (
    NO_LOCK,
    FolderLock,
    fsync_folder,
    require_no_links,
    temporary_path,
    whole_folder,
    write_file,
)
from dtcache.errors import (
    CacheBusyError,
    CacheDamagedError,
    CacheMismatchError,
    DiskError,
    NoLocksWarning,
)
from dtcache.store.writer import CacheWriter
from pipelines.runs.folder import claim_run

NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL]
NO_FSYNC = [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP]


def refuse(number: int) -> Callable[..., None]:
    """Return a function that raises OSError."""

    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def refuse_folders(patch: pytest.MonkeyPatch, number: int) -> None:
    """Make the fsync of folders, but not of files, raise OSError."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_without_flock_a_line_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without flock, a folder is written without a lock, with one warning."""
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    reason = os.strerror(number)
    with (
        pytest.warns(NoLocksWarning, match=rf"its file system has no file locks \({reason}\)"),
        FolderLock(tmp_path / "cache"),
    ):
        pass
    with pytest.warns(NoLocksWarning), whole_folder(tmp_path / "new") as folder:
        write_file(folder / "file", b"content")
    assert (tmp_path / "new" / "file").read_bytes() == b"content"


def test_no_lock_goes_on_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the environment variable, no lock is taken and nothing is said, by two holders too."""
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
    monkeypatch.setenv(NO_LOCK, "1")
    with warnings.catch_warnings(action="error"), FolderLock(tmp_path), FolderLock(tmp_path):
        pass


def test_other_lock_errors_are_disk_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error of flock is not taken for a file system without locks."""
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(DiskError, match=r"cannot write .*\.lock: Input/output error"):
        FolderLock(tmp_path)


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verb prints one line that names --no-lock and finishes; with the flag there is no line."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        pixels = np.full((8, 8, 3), number, np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    refuse_folders(monkeypatch, errno.EINVAL)
    command = ["teacher", "train", images, "--steps", 0, "--size", 16, "--channels", "32,32"]
    command += ["--samples", 0, "--device", "cpu"]
    result = run(*command, "--out", tmp_path / "loud")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "lock" in line]
    assert line.startswith(f"warning: {tmp_path / 'loud'}: its file system has no file locks")
    assert line.endswith("With --no-lock (DTCACHE_NO_LOCK=1) this line is left out")
    result = run(*command, "--out", tmp_path / "quiet", "--no-lock")
    assert result.exit_code == 0, result.output
    assert "lock" not in result.output
    assert NO_LOCK not in os.environ


@pytest.mark.parametrize("number", NO_FSYNC, ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_fsynced_is_skipped(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are written where the file system cannot fsync folders."""
    refuse_folders(monkeypatch, number)
    write_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_failed_fsync_of_a_folder_is_an_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fsync of a folder that fails for another reason is reported."""
    refuse_folders(monkeypatch, number)
    with pytest.raises(DiskError, match=os.strerror(number)):
        fsync_folder(tmp_path)


def test_an_fsync_of_a_file_is_never_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be fsynced is an error, and it does not appear."""
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    with pytest.raises(DiskError, match="Invalid argument"):
        write_file(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


SYSTEM = ("lost+found", ".DS_Store", "._run.json", ".nfs000000000001", "Thumbs.db")


@pytest.mark.usefixtures("no_fsync")
def test_a_mount_root_is_an_empty_folder(tmp_path: Path) -> None:
    """Runs and caches begin in a folder that has only files of the system."""
    for name in SYSTEM:
        for folder in ("run", "cache"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(b"nobody's")
    claim_run(tmp_path / "run", {"seed": 0}, ())
    begin(tmp_path / "cache", tiny_plan())
    for folder in ("run", "cache"):
        assert all((tmp_path / folder / name).is_file() for name in SYSTEM)
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "notes.txt").write_bytes(b"mine")
    with pytest.raises(CacheMismatchError, match=r"holds no run: found notes\.txt"):
        claim_run(tmp_path / "run", {"seed": 0}, ())


def test_a_start_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    """A missing folder is missing again, with its parents; an empty one is empty again.

    Files of the system stay, and so does everything in a folder that had files before.
    """
    empty = tmp_path / "empty"
    used = tmp_path / "used"
    for folder, name in ((empty, "lost+found"), (used, "run.json")):
        folder.mkdir()
        (folder / name).mkdir()
    for folder in (tmp_path / "a" / "b" / "missing", empty, used):
        with pytest.raises(RuntimeError, match="first step"), FolderLock(folder):
            (folder / "data").mkdir()
            (folder / "data" / "run.json").write_text("{}")
            (folder / "config.toml").write_text("")
            raise RuntimeError("no memory in the first step")
    assert not (tmp_path / "a").exists()
    assert [path.name for path in empty.iterdir()] == ["lost+found"]
    assert {"run.json", "data", "config.toml"} <= {path.name for path in used.iterdir()}


def test_what_is_kept_stays_after_a_failure(tmp_path: Path) -> None:
    """After `keep()`, and after a block that succeeds, the files stay."""
    with pytest.raises(RuntimeError), FolderLock(tmp_path / "kept") as folder:
        (tmp_path / "kept" / "run.json").write_text("{}")
        folder.keep()
        raise RuntimeError
    with FolderLock(tmp_path / "good"):
        (tmp_path / "good" / "run.json").write_text("{}")
    for name in ("kept", "good"):
        assert (tmp_path / name / "run.json").is_file()


def test_a_lock_of_a_folder_whose_start_failed_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that opened the lock's file before a failed start removed it takes another one.

    Otherwise two processes could hold the lock of one folder, each on a file of its own.
    """
    real = fcntl.flock
    removed = []

    def removing(handle: int, operation: int) -> None:
        if not removed:
            removed.append((tmp_path / "cache" / ".lock").unlink())
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", removing)
    with FolderLock(tmp_path / "cache"):
        assert removed and (tmp_path / "cache" / ".lock").is_file()
        with pytest.raises(CacheBusyError, match="is being written by another process"):
            FolderLock(tmp_path / "cache")


def test_a_whole_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Neither the target, nor the temporary folder, nor what a killed process left in it."""
    leftover = tmp_path / ".tmp-new"
    leftover.mkdir()
    (leftover / "half").write_text("")
    for target in (tmp_path / "new", tmp_path / "a" / "b"):
        with pytest.raises(RuntimeError), whole_folder(target) as folder:
            assert [path.name for path in folder.iterdir()] == [".lock"]
            (folder / "config.json").write_text("{}")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_written_through_a_link(tmp_path: Path) -> None:
    """A link at the name of a file, a temporary file or a lock leads no write outside."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    target = folder / "file"
    target.symlink_to(outside)
    temporary_path(target).symlink_to(outside)
    write_file(target, b"new")
    assert target.read_bytes() == b"new" and not target.is_symlink()
    (folder / ".lock").symlink_to(tmp_path / "made")
    with pytest.raises(DiskError), FolderLock(folder):
        pass
    assert outside.read_bytes() == b"precious" and not (tmp_path / "made").exists()


def test_a_writer_enters_no_linked_folder(tmp_path: Path) -> None:
    """A run with a link is not resumed, and a cache with a linked folder is neither; none begins.

    A link to a file passes in a cache, whose files are replaced, not written through.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    run_folder = tmp_path / "run"
    claim_run(run_folder, {"seed": 0}, ())
    (run_folder / "init").symlink_to(outside)
    with pytest.raises(CacheDamagedError, match="init: expected no symbolic links in a folder"):
        claim_run(run_folder, {"seed": 0}, ())
    (run_folder / "init").unlink()
    (run_folder / "curves.png").symlink_to(outside / "x")
    with pytest.raises(CacheDamagedError, match=r"curves\.png: expected no symbolic links"):
        claim_run(run_folder, {"seed": 0}, ())
    require_no_links(run_folder, folders_only=True)


def test_a_cache_with_a_linked_folder_is_not_resumed(tmp_path: Path) -> None:
    """Resuming a cache deletes and writes nothing through a linked folder inside it."""
    writer = begin(tmp_path / "cache", tiny_plan())
    data = writer.root / "data.zarr"
    outside = data.rename(tmp_path / "outside")
    data.symlink_to(outside)
    before = sorted(path.name for path in outside.rglob("*"))
    with pytest.raises(CacheDamagedError, match=r"data\.zarr: expected no symbolic links"):
        CacheWriter.resume(writer.root)
    assert sorted(path.name for path in outside.rglob("*")) == before
