"""Among several attempts at a shard, late and foreign ones included, exactly one commit counts."""

from dataclasses import replace
from pathlib import Path

import pytest
from store.builders import begin, tiny_plan, tree, write_cache

from dtcache.errors import CacheError, CacheMismatchError, DiskError
from dtcache.recipe import FailedSample
from dtcache.store import pending_shard as attempt
from dtcache.store.commits import read_commits
from dtcache.store.pending_shard import write_attempt
from dtcache.store.writer import CacheWriter

pytestmark = pytest.mark.usefixtures("no_fsync")


def test_an_attempt_is_no_part_of_the_cache_before_its_commit(tmp_path: Path) -> None:
    """An attempt's files stay temporary until its commit, which gives the files of write_shard."""
    plan = tiny_plan()
    writer = begin(tmp_path / "a", plan)
    before = tree(tmp_path / "a")
    made = write_attempt(tmp_path / "a", writer.manifest, plan.shards[1])
    added = tree(tmp_path / "a").keys() - before.keys()
    assert added == {
        path.relative_to(tmp_path / "a").as_posix() for path in made.temporaries(tmp_path / "a")
    }
    assert len(added) == 2 and all("/.tmp-" in name for name in added)
    assert writer.missing == [0, 1, 2] == begin(tmp_path / "b", plan).missing
    size = writer.commit(made)
    begin(tmp_path / "b", plan).write_shard(plan.shards[1])
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert size == sum(o.size for o in made.record.objects)


def test_a_second_attempt_never_touches_what_is_committed(tmp_path: Path) -> None:
    """A second attempt at a committed shard changes nothing, and its files are removed."""
    plan = tiny_plan()
    writer = begin(tmp_path, plan)
    other = replace(
        plan.shards[0],
        payloads={n: [b"x" * 9 for _ in p] for n, p in plan.shards[0].payloads.items()},
    )
    zombie = write_attempt(
        tmp_path, writer.manifest, other
    )  # written before the commit of the first attempt
    assert writer.commit(write_attempt(tmp_path, writer.manifest, plan.shards[0])) > 0
    with_zombie = tree(tmp_path)
    assert writer.commit(zombie) == 0
    committed = tree(tmp_path)
    assert {
        name for name in with_zombie if ".tmp-" in name
    } == with_zombie.keys() - committed.keys()
    assert writer.commit(write_attempt(tmp_path, writer.manifest, other)) == 0  # begun later
    for shard in writer.missing:
        writer.write_shard(plan.shards[shard])
    writer.seal()
    assert (
        writer.commit(write_attempt(tmp_path, writer.manifest, other)) == 0
    )  # begun after the seal
    assert tree(tmp_path) == tree(write_cache(tmp_path.with_name("undisturbed"), plan))


def test_a_zombie_of_an_earlier_run_cannot_commit(tmp_path: Path) -> None:
    """A resume removes an earlier run's attempts, so a late worker of that run cannot commit."""
    plan = tiny_plan()
    zombie = write_attempt(tmp_path, begin(tmp_path, plan).manifest, plan.shards[0])
    writer = CacheWriter.resume(tmp_path)
    assert not list(tmp_path.rglob(".tmp-*"))
    with pytest.raises(
        CacheError,
        match=r"\.tmp-\w+-c.0.0: expected the \d+ bytes .* shard 0, got no file; check that all",
    ):
        writer.commit(zombie)
    assert (writer.missing, read_commits(tmp_path)) == ([0, 1, 2], {})
    write_cache(tmp_path, plan)
    (tmp_path / "data.zarr" / "images" / ".tmp-0f-c.0.0").write_bytes(b"written after all")
    CacheWriter.resume(tmp_path)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_files_that_are_not_as_described_are_not_committed(tmp_path: Path) -> None:
    """An attempt with a file of the wrong size is refused, and its files are removed."""
    plan = tiny_plan()
    writer = begin(tmp_path, plan)
    made = write_attempt(tmp_path, writer.manifest, plan.shards[2])
    list(made.temporaries(tmp_path))[1].write_bytes(b"short")
    with pytest.raises(
        CacheError,
        match=r"expected the \d+ bytes that were written for shard 2, got 5; check that all",
    ):
        writer.commit(made)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert writer.missing == [0, 1, 2]


@pytest.mark.parametrize("wrong", ["fingerprint", "path", "shard", "rows", "failure", "attempt"])
def test_an_attempt_at_another_cache_is_refused(tmp_path: Path, wrong: str) -> None:
    """An attempt described for another cache is refused, and no file is renamed or removed."""
    plan = tiny_plan()
    writer = begin(tmp_path, plan)
    made = write_attempt(tmp_path, writer.manifest, plan.shards[0])
    first, *rest = made.record.objects
    bad = {
        "fingerprint": replace(made, record=replace(made.record, fingerprint="0" * 64)),
        "path": replace(
            made, record=replace(made.record, objects=(replace(first, path="../c"), *rest))
        ),
        "shard": replace(made, record=replace(made.record, shard=-1)),
        "rows": replace(
            made, record=replace(made.record, content_sha256=made.record.content_sha256[1:])
        ),
        "failure": replace(
            made,
            record=replace(made.record, failures=(FailedSample(row=4, key="k", reason="none"),)),
        ),
        "attempt": replace(made, attempt="../../x"),
    }[wrong]
    before = tree(tmp_path)
    with pytest.raises(CacheMismatchError, match="belongs to another cache; it is not committed"):
        writer.commit(bad)
    assert tree(tmp_path) == before


def test_an_attempt_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that fails at its last file, or on Ctrl-C, removes its earlier files."""
    plan = tiny_plan()
    writer = begin(tmp_path, plan)
    before = tree(tmp_path)
    real = attempt.write_temporary
    for error in (DiskError("full"), KeyboardInterrupt()):
        calls = []

        def failing(
            target: Path, data: bytes, name: str, calls: list = calls, error: BaseException = error
        ) -> Path:
            calls.append(target)
            if len(calls) == 2:
                raise error
            return real(target, data, name)

        with monkeypatch.context() as patch:
            patch.setattr(attempt, "write_temporary", failing)
            with pytest.raises(type(error)):
                write_attempt(tmp_path, writer.manifest, plan.shards[0])
        assert tree(tmp_path) == before
