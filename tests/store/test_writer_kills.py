"""After a kill or a power cut at any point, a resume gives the bytes of an undisturbed run."""

import contextlib
import hashlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store.builders import Plan, begin, tiny_plan, tree, write_cache
from store.operations import Disk, Operation, Recorder, Tree, lay_out

import dtcache
from dtcache.store.contents import read_contents
from dtcache.store.verify import LocalFiles, chosen_objects, verify_contents

CRASHES = {
    "killed": {"writes": True, "names": True},
    "power cut, un-fsynced writes lost": {"writes": False, "names": True},
    "power cut, un-fsynced names lost": {"writes": True, "names": False},
    "power cut, both lost": {"writes": False, "names": False},
}


def crashed_states(before: Tree, log: list[Operation]) -> dict[str, tuple[str, Tree]]:
    """Return each distinct state that a crash after any prefix of a log leaves, with its cause.

    States that differ only below .tmp-data.zarr count once, because the next run deletes that
    folder unread.
    """
    disk = Disk(before)
    states = dict[str, tuple[str, Tree]]()
    for place in range(len(log) + 1):
        for crash, lost in CRASHES.items():
            left = disk.left(**lost)
            layout = [path for path in left if path.startswith(".tmp-data.zarr/")]
            essence = sorted((path, data) for path, data in left.items() if path not in set(layout))
            digest = hashlib.sha256(repr((essence, len(layout) // 40)).encode()).hexdigest()
            states.setdefault(digest, (f"{crash} after operation {place} of {len(log)}", left))
        if place < len(log):
            disk.apply(log[place])
    return states


def assert_resumes(
    states: dict[str, tuple[str, Tree]], folder: Path, plan: Plan, wanted: Tree
) -> None:
    """Assert that every state resumes to the complete cache and that verify reports no damage."""
    for number, (how, left) in enumerate(states.values()):
        root = lay_out(left, folder / f"{number:04}")
        if "manifest.json" in left:
            contents = read_contents(root)
            found = verify_contents(
                LocalFiles(root), contents, chosen_objects(contents, 1.0, 0), lambda wanted: None
            )
            assert found.damage == (), how
        assert tree(write_cache(root, plan)) == wanted, how
        shutil.rmtree(root)


def test_a_crash_after_any_operation_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash at any operation, with un-fsynced data kept or lost, a resume is exact."""
    plan = tiny_plan()
    root = tmp_path / "cache"
    root.mkdir()
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch)
        write_cache(root, plan)
    wanted = tree(root)
    log = recorder.log
    disk = Disk({})
    for operation in log:
        disk.apply(operation)
    assert disk.left(writes=True, names=True) == wanted  # the log is complete
    states = crashed_states({}, log)
    begun = [left for _, left in states.values() if "manifest.json" in left]
    # The states cover all phases: nothing yet, half a layout, some shards, all shards, half of the
    # records deleted.
    assert len(begun) > 50 and len(states) - len(begun) > 5
    assert {sum(path.startswith("commits/0") for path in left) for left in begun} == {0, 1, 2, 3}
    assert any(b'"sealed"' in (left["manifest.json"] or b"") for left in begun)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    assert_resumes(states, tmp_path, plan, wanted)


def test_a_crash_without_any_fsync_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulation detects missing fsyncs: without them, power cuts leave damaged shards."""
    plan = tiny_plan()
    root = tmp_path / "cache"
    root.mkdir()
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch)
        write_cache(root, plan)
    files = {
        o.path
        for o in recorder.log
        if o.kind == "create" and "c.1" in o.path and "codec" not in o.path
    }
    careless = [o for o in recorder.log if o.kind != "fsync" or o.path not in files]
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    with pytest.raises(AssertionError, match="un-fsynced writes lost after operation"):
        assert_resumes(crashed_states({}, careless), tmp_path, plan, tree(root))


def test_a_second_crash_while_resuming_is_no_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash of a resume at any operation, the next resume is still exact."""
    plan = tiny_plan()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        wanted = tree(write_cache(tmp_path / "undisturbed", plan))
        root = tmp_path / "cache"
        begin(root, plan).write_shard(plan.shards[0])
    for path in (
        "data.zarr/images/c.1.0",
        "data.zarr/images/.tmp-c.2.0",
        "commits/.tmp-000001.json",
    ):
        (root / path).write_bytes(b"left by the first kill")
    before = tree(root)
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch)
        begin(root, plan)
    assert [operation.kind for operation in recorder.log] == ["unlink"] * 3
    states = crashed_states(before, recorder.log)
    assert len(states) == 4
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    assert_resumes(states, tmp_path, plan, wanted)


_WRITERS = """
import os, pickle, sys
from pathlib import Path
import zarr
from store.builders import begin
from dtcache.atomic_files import FolderLock
plan, root = pickle.loads(Path(sys.argv[2]).read_bytes()), Path(sys.argv[1])
print("torch" in sys.modules or "numba" in sys.modules, flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        with FolderLock(root):
            writer = begin(root, plan)
            for shard in writer.missing:
                writer.write_shard(plan.shards[shard])
            writer.seal()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def kill_and_resume(folder: Path, kills: int) -> None:
    """Kill torch-free writers at `kills` random moments, then compare with an undisturbed run.

    One warm process forks the writers. Each takes milliseconds, so the kills hit the writes and not
    the imports.
    """
    plan = tiny_plan()
    (folder / "plan.pickle").write_bytes(pickle.dumps(plan))
    root = folder / "cache"
    wanted = tree(write_cache(folder / "undisturbed", plan))
    where = os.pathsep.join(
        [str(Path(__file__).parents[1]), str(Path(dtcache.__file__).parents[1])]
    )
    command = [sys.executable, "-c", _WRITERS, str(root), str(folder / "plan.pickle")]
    moments = random.Random(5)
    done = False
    killed = 0
    seconds = 0.0
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": where},
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline() == "False\n"
        while killed < kills or not done:
            server.stdin.write("\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            began = time.monotonic()
            if seconds and killed < kills:
                time.sleep(moments.uniform(0, seconds))
                with contextlib.suppress(ProcessLookupError):  # the writer had ended already
                    os.kill(child, signal.SIGKILL)
            code = int(server.stdout.readline())
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            if code == 0:
                seconds = seconds or time.monotonic() - began
                assert tree(root) == wanted
                done = killed == kills
                shutil.rmtree(root)
        server.stdin.close()
    assert killed == kills


def test_twenty_sigkills_and_resumes_give_the_same_bytes(tmp_path: Path) -> None:
    """Twenty SIGKILLs at random moments of a write, each followed by a resume, change no byte."""
    kill_and_resume(tmp_path, 20)


@pytest.mark.slow
def test_three_hundred_sigkills_and_resumes_give_the_same_bytes(tmp_path: Path) -> None:
    """Three hundred SIGKILLs change no byte."""
    kill_and_resume(tmp_path, 300)
