"""Kills: whatever operation a writer dies before, a resume ends in the bytes of a run that nobody disturbed."""

import builtins
import hashlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store.builders import begin, tiny_plan, tree, write_cache

import dtcache
from dtcache import storage


class Snapshots:
    """Copies a folder before every operation that changes a file system, as a SIGKILL at that moment would leave it.

    A write is cut in half: there is a moment at which only its first half is in the file. Equal states are kept once.
    """

    def __init__(self, root: Path, into: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.into = root, into
        self.seen: set[str] = set()
        self._lock = threading.RLock()  # zarr-python writes in threads of its own
        self._busy = False
        self._operations = 0
        for name in ("replace", "rename", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, self._before(getattr(os, name)))
        patch.setattr(os, "fsync", self._before(lambda handle: None))
        patch.setattr(storage, "open", self._open, raising=False)

    def take(self) -> None:
        """Copy the folder if no equal copy was taken; while zarr-python lays out its nodes, every seventh time."""
        self._operations += 1
        if self._operations % 7 and (self.root / ".tmp-data.zarr").exists():
            return
        with self._lock:
            self._busy = True  # the copy's own operations are not the writer's
            digest = hashlib.sha256(repr(sorted(state(self.root).items())).encode()).hexdigest()
            if digest not in self.seen:
                self.seen.add(digest)
                shutil.copytree(self.root, self.into / f"{len(self.seen):04}", copy_function=shutil.copyfile)
            self._busy = False

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with self._lock:
                if not self._busy:
                    self.take()
                return function(*args, **options)

        return call

    def _open(self, path: Path, mode: str) -> Any:
        self.take()
        return Torn(path, self.take) if "w" in mode else builtins.open(path, mode)


class Torn:
    """A file whose writes arrive in two halves, with a snapshot after each."""

    def __init__(self, path: Path, take: Callable[[], None]) -> None:
        self._file = builtins.open(path, "wb", buffering=0)  # noqa: SIM115
        self._take = take

    def __enter__(self) -> "Torn":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        """Write one half, then the other."""
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._file.write(half)
            self._take()


def state(root: Path) -> dict[str, bytes | None]:
    """Return everything in a folder, temporary files too."""
    return {p.relative_to(root).as_posix(): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


def test_a_kill_before_any_operation_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From every state that a kill can leave, of creating, writing, sealing and cleaning up, a resume is exact."""
    plan = tiny_plan()
    root, into = tmp_path / "cache", tmp_path / "killed"
    root.mkdir()
    into.mkdir()
    with monkeypatch.context() as patch:
        snapshots = Snapshots(root, into, patch)
        write_cache(root, plan)
        snapshots.take()
    wanted = tree(root)
    left = sorted(into.iterdir())
    begun = [(p / "manifest.json").exists() for p in left]
    # All phases are among the states: nothing yet, half a layout, some shards, all of them, half of the records gone.
    assert sum(begun) > 40 and len(left) - sum(begun) > 10
    assert {len(list((p / "commits").glob("0*"))) for p in left if (p / "commits").exists()} == {0, 1, 2, 3}
    assert any(b'"sealed"' in (p / "manifest.json").read_bytes() for p, b in zip(left, begun, strict=True) if b)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for killed in left:
        assert tree(write_cache(killed, plan)) == wanted, f"state {killed.name} of {len(left)}"


_WRITER = """
import pickle, sys, time
from pathlib import Path
from store.builders import begin
from dtcache.storage import FolderLock
plan = pickle.loads(Path(sys.argv[2]).read_bytes())
with FolderLock(Path(sys.argv[1])):
    print("begin", flush=True)
    writer = begin(Path(sys.argv[1]), plan)
    for shard in writer.missing:
        print("shard", flush=True)
        writer.write_shard(plan.shards[shard])
        time.sleep(0.01)
    print("seal", flush=True)
    writer.seal()
print("torch" in sys.modules or "numba" in sys.modules, flush=True)
"""


def test_sigkill_and_resume_gives_the_same_bytes(tmp_path: Path) -> None:
    """A real torch-free process, killed at random moments of each phase and resumed, ends in undisturbed bytes."""
    plan = tiny_plan()
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps(plan))
    root = tmp_path / "cache"
    where = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(dtcache.__file__).parents[1])])
    command = [sys.executable, "-c", _WRITER, str(root), str(tmp_path / "plan.pickle")]
    moments = random.Random(5)
    for phase in ("begin", "shard", "shard", "seal", None):
        environment = {**os.environ, "PYTHONPATH": where}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            if phase is None:
                said = process.stdout.read().split()
                assert process.wait() == 0
                assert said[-1] == "False"
                break
            for line in process.stdout:
                if line.strip() == phase:
                    break
            time.sleep(moments.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
    wanted = tree(write_cache(tmp_path / "undisturbed", plan))
    assert tree(root) == wanted


def test_a_second_kill_while_resuming_is_no_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume that is killed itself, at any operation, leaves a state that the next resume finishes exactly."""
    plan = tiny_plan()
    wanted = tree(write_cache(tmp_path / "undisturbed", plan))
    root, into = tmp_path / "cache", tmp_path / "killed"
    begin(root, plan).write_shard(plan.shards[0])
    for path in ("data.zarr/images/c.1.0", "data.zarr/images/.tmp-c.2.0", "commits/.tmp-000001.json"):
        (root / path).write_bytes(b"left by the first kill")
    into.mkdir()
    with monkeypatch.context() as patch:
        snapshots = Snapshots(root, into, patch)
        begin(root, plan)
        snapshots.take()
    left = sorted(into.iterdir())
    assert len(left) == 4
    for killed in left:
        assert tree(write_cache(killed, plan)) == wanted
