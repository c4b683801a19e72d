"""Verify reports every wrong byte with its file and samples, and no false damage."""

import errno
import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from store.builders import FEATURES, ROWS, VIEWS, begin, tiny_plan, tree, write_cache
from support.files import exchange_chunks, flip
from support.hostile import replace_table, reseal

from dtcache import hashing
from dtcache.errors import (
    CacheBusyError,
    CacheDamagedError,
    CacheFormatError,
    CacheNotFoundError,
)
from dtcache.hashing import canonical_json, sha256_json
from dtcache.recipe import Json
from dtcache.store import contents as contents_module
from dtcache.store.contents import Damage, SamplePlace, read_contents
from dtcache.store.layout import CODEC, DATA, IMAGES
from dtcache.store.parquet_tables import read_table
from dtcache.store.reader import CacheReader
from dtcache.store.sample_index import hash_samples
from dtcache.store.shard import index_bytes, parse_index
from dtcache.store.shard_index import SHARD_SCHEMA
from dtcache.store.summary import inspect_cache
from dtcache.store.verify import (
    LocalFiles,
    Verification,
    check_object,
    chosen_objects,
    log_problem,
    verify_contents,
)

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sealed cache with a log, that no test changes."""
    root = write_cache(tmp_path_factory.mktemp("verify") / "cache", tiny_plan())
    begin(root, tiny_plan()).write_log({"seconds": 0.1 + 0.2, "host": "somewhere"})
    return root


@pytest.fixture
def root(shared: Path, tmp_path: Path) -> Path:
    """A copy of the tiny cache, to be damaged."""
    return Path(shutil.copytree(shared, tmp_path / "cache"))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A cache with the first two of its three shards committed."""
    root = tmp_path / "begun"
    for shard in range(2):
        begin(root, tiny_plan()).write_shard(tiny_plan().shards[shard])
    return root


def verify(root: Path, share: float = 1.0, seed: int = 0) -> Verification:
    """Check a cache."""
    contents = read_contents(root)
    return verify_contents(
        LocalFiles(root), contents, chosen_objects(contents, share, seed), lambda wanted: None
    )


def swap(first: Path, second: Path) -> None:
    """Exchange two files."""
    a = first.read_bytes()
    b = second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def test_a_whole_cache_is_good(root: Path) -> None:
    """In an intact cache every shard is checked, and no file is damaged, unnamed or changed."""
    (root / "cluster.log").write_text("WARNING distributed.nanny: Restarting worker")
    before = tree(root)
    found = verify(root)
    assert (found.state, found.damage, found.unnamed) == ("good", (), {})
    assert {wanted.path for wanted in found.checked} == {
        a.object_path(s) for a in tiny_plan().arrays.values() for s in range(3)
    }
    assert tree(root) == before


def problem_of(root: Path, name: str) -> Callable[[], object]:
    """Return verify's check of one file, which returns a problem or raises on damage."""
    contents = read_contents(root)
    assert contents.manifest is not None
    wanted = next((o for o in contents.objects if o.path == name), None)
    if wanted is not None:
        return functools.partial(check_object, LocalFiles(root), wanted, contents.keys, {})
    if name == "extraction.log.json":
        return functools.partial(log_problem, root / name)
    if name in contents.manifest.files:
        return functools.partial(hashing.file_problem, root / name, contents.manifest.files[name])
    assert name == "manifest.json" or name.startswith("commits/")
    return lambda: read_contents(root).damage


def found_by(check: Callable[[], object]) -> bool:
    """Return whether a check reports a problem."""
    try:
        return bool(check())
    except (CacheFormatError, CacheNotFoundError):
        return True


@pytest.mark.parametrize("state", ["sealed", "begun"])
def test_every_flipped_byte_and_every_truncation_of_every_file_is_found(
    root: Path, begun: Path, state: str
) -> None:
    """Any flipped byte and any truncation of any file is found; an intact file is accepted."""
    folder = {"sealed": root, "begun": begun}[state]
    names = [name for name, content in tree(folder).items() if content is not None]
    names += ["extraction.log.json"] * (state == "sealed")
    assert len(names) > 11
    for name in names:
        path = folder / name
        check = problem_of(folder, name)
        content = path.read_bytes()
        assert not found_by(check)
        # test_manifest.py flips every other byte of the parsed files; here every tenth is enough.
        places = range(
            0, len(content), 10 if name == "manifest.json" or name.startswith("commits/") else 1
        )
        with open(path, "r+b", buffering=0) as file:
            for place in places:
                os.pwrite(file.fileno(), bytes([content[place] ^ (1 << place % 8)]), place)
                assert found_by(check), f"{name}: byte {place} flipped"
                os.pwrite(file.fileno(), content[place : place + 1], place)
            for place in reversed(places):
                file.truncate(place)
                assert found_by(check), f"{name}: cut to {place} bytes"
        path.write_bytes(content)
        assert not found_by(check)


@pytest.mark.parametrize("state", ["sealed", "begun"])
@pytest.mark.parametrize("what", ["flipped", "empty", "gone", "longer"])
def test_each_damaged_file_is_named_and_no_other(
    root: Path, begun: Path, state: str, what: str
) -> None:
    """After damage to one file, a full check reports that file alone."""
    folder = {"sealed": root, "begun": begun}[state]
    for name, content in tree(folder).items():
        path = folder / name
        if content is None or (what == "gone" and name == "manifest.json"):
            continue
        if what == "flipped":
            flip(path, len(content) // 2, 1 << len(content) // 2 % 8)
        elif what == "gone":
            path.unlink()
        else:
            path.write_bytes(b"" if what == "empty" else content + b"\0")
        found = verify(folder)
        if what == "gone" and name.startswith("commits/"):
            # A shard without its record counts as not written: a resume recomputes it.
            assert (found.state, found.contents.missing) == ("incomplete", (int(name[8:14]), 2))
        else:
            assert found.state == "damaged"
            assert {damage.path for damage in found.damage} == {name}
        path.write_bytes(content)
    assert verify(folder).damage == ()


def test_a_damaged_chunk_is_told_by_shard_tap_key_and_view(root: Path) -> None:
    """A flip in a chunk names its sample and view; a flip in an index names all samples."""
    keys = [s.key for s in tiny_plan().samples]
    wanted = next(
        o for o in read_contents(root).objects if (o.array.name, o.shard) == (FEATURES, 1)
    )
    flip(root / wanted.path, 3)
    [damage] = verify(root).damage
    assert replace(damage, samples=tuple(damage.samples)) == Damage(
        path="data.zarr/t150/c.1.0.0",
        reason="1 of its chunks: the checksum does not match",
        array=FEATURES,
        shard=1,
        samples=(SamplePlace(row=4, key=keys[4], view=0),),
    )
    flip(root / wanted.path, 3)
    flip(root / "data.zarr/images/c.2.0", 3)
    [damage] = verify(root).damage
    assert (damage.array, damage.shard) == (IMAGES, 2)
    assert list(damage.samples) == [SamplePlace(row=8, key=keys[8], view=None)]
    flip(root / "data.zarr/images/c.2.0", 3)
    flip(root / "data.zarr/t150/c.2.0.0", -2)
    [damage] = verify(root).damage
    assert damage.reason == "the shard's index is damaged"
    assert list(damage.samples) == [
        SamplePlace(row=row, key=keys[row], view=None) for row in (8, 9)
    ]


def test_every_chunk_of_a_shard_is_located(root: Path) -> None:
    """A flip in the first byte of each chunk is reported with that chunk's row and view."""
    array = tiny_plan().arrays[FEATURES]
    path = root / array.object_path(0)
    content = path.read_bytes()
    entries = array.shard_rows * array.payloads_per_row
    offsets = parse_index(content[-index_bytes(entries) :], array, len(content))[:, 0].tolist()
    for entry, offset in enumerate(offsets):
        flip(path, offset, 1 << offset % 8)
        [damage] = verify(root).damage
        assert [(s.row, s.view) for s in damage.samples] == [divmod(entry, VIEWS)]
        path.write_bytes(content)


def with_equal_shards(root: Path) -> Path:
    """Write a cache whose first two shards of features differ in tags but not in size."""
    plan = tiny_plan()
    same = plan.shards[0].payloads[FEATURES]
    second = replace(plan.shards[1], payloads={**plan.shards[1].payloads, FEATURES: same})
    return write_cache(root, replace(plan, shards=[plan.shards[0], second, plan.shards[2]]))


def test_two_intact_shards_of_one_size_that_are_swapped(tmp_path: Path) -> None:
    """Two exchanged shards of equal size are both reported, each with the other's name."""
    root = with_equal_shards(tmp_path / "cache")
    names = [f"data.zarr/{FEATURES}/c.{shard}.0.0" for shard in range(2)]
    assert (root / names[0]).stat().st_size == (root / names[1]).stat().st_size
    swap(root / names[0], root / names[1])
    found = verify(root).damage
    assert [damage.path for damage in found] == names
    assert found[0].reason.endswith(f"it is {names[1]}") and found[1].reason.endswith(
        f"it is {names[0]}"
    )
    assert [s.row for s in found[0].samples] == [0, 1, 2, 3]


def test_a_payload_in_another_place_is_named(root: Path) -> None:
    """Two intact chunks whose entries in the index are exchanged are each named with the sample."""
    path = root / f"data.zarr/{FEATURES}/c.0.0.0"
    exchange_chunks(path, tiny_plan().arrays[FEATURES], 0, 3)
    [damage] = verify(root).damage
    assert damage.reason == (
        "2 of its chunks: it is not the payload of this cache, array, row and view"
    )
    assert [(s.row, s.view) for s in damage.samples] == [(0, 0), (1, 1)]


def test_files_of_another_cache_or_another_tap(root: Path, tmp_path: Path) -> None:
    """Intact files of a different cache or tap are reported under any name."""
    plan = tiny_plan()
    shards = [
        replace(
            s,
            payloads={
                **s.payloads,
                FEATURES: [p[:-1] + bytes([p[-1] ^ 1]) if p else p for p in s.payloads[FEATURES]],
            },
        )
        for s in plan.shards
    ]
    other = write_cache(
        tmp_path / "other", replace(plan, shards=shards, recipe=replace(plan.recipe, seed=9))
    )
    for name in (f"data.zarr/{FEATURES}/c.0.0.0", "shards.parquet"):
        shutil.copy(other / name, root / name)
        assert {damage.path for damage in verify(root).damage} == {name}
        shutil.copytree(other, tmp_path / name.replace("/", "-"))
        shutil.copy(write_cache(tmp_path / "again", plan) / name, root / name)
    for name, source in (
        (f"data.zarr/{FEATURES}/c.1.0.0", f"data.zarr/{FEATURES}/c.0.0.0"),
        (f"data.zarr/{FEATURES}/zarr.json", "data.zarr/images/zarr.json"),
        (CODEC, "samples.parquet"),
    ):
        shutil.copy(root / source, root / name)
        assert {damage.path for damage in verify(root).damage} == {name}
        shutil.copy(tmp_path / "again" / name, root / name)
    assert verify(root).state == "good"


def test_the_manifest_of_another_cache_and_of_another_time(
    root: Path, begun: Path, tmp_path: Path
) -> None:
    """An intact manifest of a different cache, or of an earlier state, is reported as damage."""
    plan = tiny_plan()
    stale = (begun / "manifest.json").read_bytes()
    (root / "manifest.json").write_bytes(stale)
    found = verify(root)
    assert {damage.path for damage in found.damage} == {"samples.parquet"}
    assert found.contents.missing == (0, 1, 2)
    shards = [plan.shards[0], replace(plan.shards[1], failures=()), plan.shards[2]]
    other = write_cache(tmp_path / "other", replace(plan, shards=shards))
    shutil.copy(other / "manifest.json", root / "manifest.json")
    assert "samples.parquet" in {damage.path for damage in verify(root).damage}


def test_a_damaged_manifest_is_all_that_is_said(root: Path) -> None:
    """If the manifest is damaged, verify reports nothing else."""
    flip(root / "manifest.json", 40)
    found = verify(root)
    assert [damage.path for damage in found.damage] == ["manifest.json"]
    assert (found.checked, found.unnamed, found.contents.manifest) == ((), {}, None)


def test_without_a_shard_index_damage_is_still_located(root: Path) -> None:
    """Without shards.parquet, the checksums inside the shards still name the damaged sample."""
    (root / "shards.parquet").unlink()
    flip(root / f"data.zarr/{FEATURES}/c.0.0.0", 3)
    first, second = verify(root).damage
    assert (first.path, first.reason) == ("shards.parquet", "no file")
    assert [(s.row, s.view) for s in second.samples] == [(0, 0)]


def test_without_a_sample_index_rows_are_named(root: Path) -> None:
    """If samples.parquet is damaged, other damage is reported by row instead of by key."""
    flip(root / "samples.parquet", 99)
    flip(root / f"data.zarr/{FEATURES}/c.0.0.0", 3)
    damage = {d.path: d for d in verify(root).damage}
    [sample] = damage[f"data.zarr/{FEATURES}/c.0.0.0"].samples
    assert sample == SamplePlace(row=0, key=None, view=0)
    assert damage["samples.parquet"].reason.startswith("expected SHA-256 ")


def test_files_that_nothing_names_are_reported(root: Path) -> None:
    """Unknown files, leftovers and links are listed with their kind and are not damage."""
    (root / "notes.txt").write_text("mine")
    (root / "data.zarr" / FEATURES / "c.7.0.0").write_bytes(b"x")
    (root / "data.zarr" / ".tmp-x").write_bytes(b"")
    (root / "commits").mkdir()
    (root / "commits" / "000001.json").write_bytes(b"{}")
    (root / "nowhere").symlink_to(root / "gone")
    found = verify(root)
    assert found.state == "good"
    assert found.unnamed == {
        "notes.txt": "not part of the cache",
        f"data.zarr/{FEATURES}/c.7.0.0": "not part of the cache",
        "data.zarr/.tmp-x": "left by an interrupted run",
        "commits/000001.json": "left by an interrupted seal; the next extraction finishes it",
        "nowhere": "not part of the cache",
    }


def test_an_unfinished_cache_is_incomplete_not_damaged(begun: Path) -> None:
    """Temporary files and shards without a record are reported, but not as damage."""
    (begun / "data.zarr" / FEATURES / ".tmp-c.2.0.0").write_bytes(b"half")
    (begun / "data.zarr" / FEATURES / "c.2.0.0").write_bytes(b"renamed, never committed")
    found = verify(begun)
    assert (found.state, found.damage, found.contents.missing) == ("incomplete", (), (2,))
    assert len(found.checked) == 4
    assert found.unnamed == {
        f"data.zarr/{FEATURES}/.tmp-c.2.0.0": "left by an interrupted run",
        f"data.zarr/{FEATURES}/c.2.0.0": "never committed; the next extraction writes it again",
    }
    flip(begun / "data.zarr" / FEATURES / "c.1.0.0", 5)
    assert [d.path for d in verify(begun).damage] == [f"data.zarr/{FEATURES}/c.1.0.0"]


def test_a_commit_record_of_another_cache_is_damage(begun: Path) -> None:
    """An intact record with another fingerprint, or for other files, is reported by its name."""
    path = begun / "commits" / "000001.json"
    for field, value in (("fingerprint", "0" * 64), ("objects", [])):
        content = path.read_bytes()
        record = json.loads(content)
        record[field] = value
        del record["sha256"]
        path.write_bytes(canonical_json({**record, "sha256": sha256_json(record)}))
        [damage] = verify(begun).damage
        assert (damage.path, damage.reason) == (
            "commits/000001.json",
            "the record belongs to another cache; delete it and run dtcache extract again",
        )
        path.write_bytes(content)
    path.rename(path.with_name("1of2.json"))
    found = verify(begun)
    assert [damage.path for damage in found.damage] == ["commits/1of2.json"]
    assert found.contents.missing == (1, 2)


def test_a_sample_is_a_seeded_share_of_whole_shards(root: Path) -> None:
    """A partial check reads a seeded choice of shards, but all sizes and all other files."""
    contents = read_contents(root)
    picked = {seed: {o.shard for o in chosen_objects(contents, 0.05, seed)} for seed in range(20)}
    assert all(len(shards) == 1 for shards in picked.values())
    assert set().union(*picked.values()) == {0, 1, 2}
    assert picked[3] == {o.shard for o in chosen_objects(contents, 0.05, 3)}
    assert {len(chosen_objects(contents, share, 0)) for share in (0.34, 2 / 3)} == {4}
    seed = next(s for s, shards in picked.items() if shards == {1})
    flip(root / f"data.zarr/{FEATURES}/c.0.0.0", 3)
    assert verify(root, 0.05, seed).state == "good"
    assert len(verify(root, 0.05, seed).checked) == 2
    (root / f"data.zarr/{FEATURES}/c.0.0.0").write_bytes(b"")
    assert verify(root, 0.05, seed).state == "damaged"


def test_a_disk_that_fails_to_read_is_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read error of one file is reported with its name, and the check continues."""
    real = hashing.file_sha256

    def failing(path: Path) -> str:
        if path.name == "zarr.json" and path.parent.name == FEATURES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(hashing, "file_sha256", failing)
    chunk = (root / f"data.zarr/{FEATURES}/c.1.0.0").stat().st_ino
    pread = os.pread

    def failing_pread(handle: int, size: int, offset: int) -> bytes:
        if os.fstat(handle).st_ino == chunk:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(handle, size, offset)

    monkeypatch.setattr(os, "pread", failing_pread)
    found = {damage.path: damage.reason for damage in verify(root).damage}
    assert found == {
        f"data.zarr/{FEATURES}/c.1.0.0": "Input/output error at byte 0; check the disk",
        f"data.zarr/{FEATURES}/zarr.json": "it cannot be read (Input/output error)",
    }


def test_a_cache_that_is_finished_meanwhile(begun: Path) -> None:
    """A seal during the check is reported as a seal, not as damage."""
    contents = read_contents(begun)
    write_cache(begun, tiny_plan())
    with pytest.raises(CacheBusyError, match="finished while it was being checked; check it again"):
        verify_contents(
            LocalFiles(begun), contents, chosen_objects(contents, 1.0, 0), lambda wanted: None
        )


def test_no_cache_and_a_newer_one(tmp_path: Path, root: Path) -> None:
    """A folder without a manifest and a newer format raise errors and are not damage."""
    with pytest.raises(CacheNotFoundError, match=r"is not a cache: expected manifest\.json in it"):
        verify(tmp_path)
    (root / "manifest.json").write_text('{"format":3}')
    with pytest.raises(
        CacheFormatError, match="expected format 2, got 3; install the dtcache that wrote it"
    ):
        verify(root)


@pytest.mark.parametrize("what", ["one image", "all zeros"])
def test_small_and_empty_caches_are_good(tmp_path: Path, what: str) -> None:
    """A one-row cache and an all-zero cache are good, and a flip in either is reported."""
    plan = tiny_plan()
    shards = plan.shards
    if what == "all zeros":
        shards = [
            replace(s, payloads={n: [b""] * len(p) for n, p in s.payloads.items()}) for s in shards
        ]
    else:
        first = shards[0]
        payloads = {n: p[: 1 if n == IMAGES else VIEWS] for n, p in first.payloads.items()}
        shards = [replace(first, payloads=payloads, content_sha256=first.content_sha256[:1])]
        samples = plan.samples[:1]
        recipe = replace(plan.recipe, num_samples=1, samples_sha256=hash_samples(samples))
        arrays = {n: replace(a, shape=(1, *a.shape[1:])) for n, a in plan.arrays.items()}
        plan = replace(plan, recipe=recipe, arrays=arrays, samples=samples)
    root = write_cache(tmp_path / "cache", replace(plan, shards=shards))
    assert verify(root).state == "good"
    assert len(verify(root).checked) == 2 * (1 if what == "one image" else -(-ROWS // 4))
    flip(root / f"data.zarr/{FEATURES}/c.0.0.0", 0)
    [damage] = verify(root).damage
    assert [(s.row, s.view) for s in damage.samples] == [(0, 0)]


@pytest.mark.parametrize("state", ["root", "begun"])
def test_files_of_the_system_are_nobodys(state: str, request: pytest.FixtureRequest) -> None:
    """Files of file systems and desktops are neither damage, nor listed, nor removed."""
    root = request.getfixturevalue(state)
    before = verify(root)
    (root / "lost+found").mkdir()
    names = (".DS_Store", "._manifest.json", f"{DATA}/.nfs0001", "lost+found/#12", "Thumbs.db")
    for name in names:
        (root / name).write_bytes(b"nobody's")
    after = verify(root)
    assert (after.damage, after.unnamed) == (before.damage, before.unnamed) == ((), {})
    begin(root, tiny_plan())
    assert all((root / name).read_bytes() == b"nobody's" for name in names)


def of_a_billion_samples(manifest: Json) -> None:
    """Change a manifest to 2^30 samples in shards of 2^20 rows."""
    manifest["recipe"] |= {"num_samples": 1 << 30, "shard_rows": 1 << 20}
    for array in manifest["arrays"].values():
        array["shape"][0] = 1 << 30
        array["shard_rows"] = 1 << 20


def test_a_billion_samples_without_a_row_are_told_at_once(root: Path) -> None:
    """A manifest of 2^30 samples is held against its tables; no sample takes memory."""
    reseal(root, of_a_billion_samples)
    found = verify(root)
    damage = {d.path: d.reason for d in found.damage}
    assert damage["samples.parquet"].startswith("expected 1073741824 rows, got 10")
    assert damage["shards.parquet"].startswith("expected one row per shard and array, 2048, got 6")
    assert sum(len(d.samples) for d in found.damage) == 2 << 30
    with pytest.raises(CacheDamagedError, match="expected 1073741824 rows, got 10"):
        inspect_cache(root)


def test_more_files_than_any_index_lists_are_not_looked_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a shard index, the files of a manifest of any number of shards are not listed."""
    monkeypatch.setattr(contents_module, "MAX_UNLISTED", 2047)
    reseal(root, of_a_billion_samples)
    assert verify(root).contents.objects == ()


@pytest.mark.parametrize(
    "name",
    [
        "samples.parquet",
        "shards.parquet",
        "extraction.log.json",
        f"data.zarr/{FEATURES}/zarr.json",
        CODEC,
        f"data.zarr/{FEATURES}/c.0.0.0",
    ],
)
def test_a_fifo_makes_no_check_wait(root: Path, name: str) -> None:
    """A FIFO in place of a file of a cache is damage of that file."""
    (root / name).unlink()
    os.mkfifo(root / name)
    [damage] = verify(root).damage
    assert damage.path == name
    assert "got a FIFO" in damage.reason or damage.reason == "no file"


def test_a_fifo_in_place_of_a_record_makes_no_check_wait(begun: Path) -> None:
    """A FIFO in place of a commit record is damage of that record; inspect refuses it."""
    path = begun / "commits" / "000000.json"
    path.unlink()
    os.mkfifo(path)
    [damage] = verify(begun).damage
    assert damage.path == "commits/000000.json" and "got a FIFO" in damage.reason
    with pytest.raises(CacheDamagedError, match=r"000000\.json: not a commit .* got a FIFO"):
        inspect_cache(begun)


@pytest.mark.parametrize(
    ("column", "value"), [("bytes", -1), ("bytes", 1 << 40), ("sha256", "0"), ("path", "../x")]
)
def test_a_shard_index_of_impossible_files_is_damage(
    root: Path, column: str, value: object
) -> None:
    """A size that no shard can have, a text that is no hash and a foreign path are refused."""
    table = read_table(root / "shards.parquet", SHARD_SCHEMA)
    rows = table.to_pylist()
    rows[0][column] = value
    replace_table(root / "shards.parquet", pa.Table.from_pylist(rows, SHARD_SCHEMA))
    [damage] = verify(root).damage
    assert damage.path == "shards.parquet"
    with pytest.raises(CacheDamagedError, match=r"shards\.parquet: "):
        CacheReader(root)
