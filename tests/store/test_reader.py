"""The reader agrees with zarr-python and detects every kind of damage that a disk can cause."""

import errno
import gc
import json
import os
import pickle
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from numcodecs.zstd import compress
from numpy.typing import ArrayLike
from store.builders import (
    FAILED_ROW,
    FEATURES,
    ROWS,
    VIEWS,
    begin,
    tiny_plan,
    tree,
    write_cache,
)

from dtcache.errors import CacheDamagedError, CacheError, CacheIncompleteError, CacheNotFoundError
from dtcache.hashing import canonical_json, file_sha256
from dtcache.recipe import FailedSample
from dtcache.store import commits as commits_module
from dtcache.store import reader as reader_module
from dtcache.store import shard, zstd_frame
from dtcache.store.chunk_index import ChunkIndex
from dtcache.store.commits import read_commits, write_commit
from dtcache.store.contents import read_contents
from dtcache.store.layout import IMAGES, PayloadArray
from dtcache.store.manifest import read_manifest, write_manifest
from dtcache.store.parquet_tables import parquet_bytes, read_table
from dtcache.store.reader import CacheReader
from dtcache.store.shard import index_bytes, parse_index
from dtcache.store.shard_index import SHARD_SCHEMA
from dtcache.store.tag import TAG_BYTES
from dtcache.store.writer import CacheWriter

NAMES = (IMAGES, FEATURES)


pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sealed cache that no test changes."""
    return write_cache(tmp_path_factory.mktemp("shared") / "cache", tiny_plan())


@pytest.fixture
def root(shared: Path, tmp_path: Path) -> Path:
    """A copy of the tiny cache, to be damaged."""
    return Path(shutil.copytree(shared, tmp_path / "cache"))


def views_of(name: str) -> int:
    """Return the number of payloads per row of an array."""
    return 1 if name == IMAGES else VIEWS


def shard_files(root: Path) -> list[tuple[str, PayloadArray, int, Path]]:
    """Return every shard's array name, array, number and file."""
    arrays = tiny_plan().arrays
    return [
        (n, a, s, root / a.object_path(s)) for n, a in arrays.items() for s in range(a.num_shards)
    ]


def read(reader: CacheReader, name: str, rows: ArrayLike, views: ArrayLike) -> np.ndarray:
    """Return payloads (B, L) without their tags, padded with zeros."""
    payloads = reader.payloads(name, rows, views)
    out = np.zeros((len(payloads), tiny_plan().arrays[name].length), np.uint8)
    for row, payload in zip(out, payloads, strict=True):
        row[: len(payload)] = payload
    return out


def read_all(reader: CacheReader) -> dict[str, np.ndarray]:
    """Read every payload of a cache, array by array."""
    pairs = {
        name: [(row, view) for row in range(ROWS) for view in range(views_of(name))]
        for name in NAMES
    }
    return {name: read(reader, name, *zip(*pairs[name], strict=True)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_zarr_reads_the_same(shared: Path, name: str) -> None:
    """zarr-python and the reader return the written bytes for every row and view."""
    plan = tiny_plan()
    group = zarr.open_group(shared / "data.zarr", mode="r")
    whole = np.asarray(group[name][...]).reshape(ROWS, views_of(name), -1)
    # The failed row has no tag: its payload is all zeros.
    whole = np.concatenate([whole[..., TAG_BYTES:], np.zeros_like(whole[..., :TAG_BYTES])], 2)
    reader = CacheReader(shared)
    for row in range(ROWS):
        for view in range(views_of(name)):
            found = read(reader, name, [row], [view])
            np.testing.assert_array_equal(found, whole[row, view][None])
            assert found.tobytes() == plan.payload(name, row, view).ljust(
                plan.arrays[name].length, b"\0"
            )
    rng = np.random.default_rng(0)
    rows = rng.integers(0, ROWS, 50)
    views = rng.integers(0, views_of(name), 50)
    np.testing.assert_array_equal(read(reader, name, rows, views), whole[rows, views])


def test_zarr_sees_nothing_foreign(shared: Path) -> None:
    """The Zarr group holds exactly the payload arrays."""
    group = zarr.open_group(shared / "data.zarr", mode="r")
    arrays = {name for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert arrays == set(NAMES)


@pytest.mark.parametrize("sealed", [True, False])
def test_an_index_of_another_length_is_damage(root: Path, tmp_path: Path, sealed: bool) -> None:
    """A sample index with more or fewer rows than the recipe's samples is refused at open."""
    if not sealed:
        root = tmp_path / "begun"
        begin(root, tiny_plan())
    manifest = read_manifest(root)
    arrays = {n: replace(a, shape=(ROWS - 1, *a.shape[1:])) for n, a in manifest.arrays.items()}
    write_manifest(
        root, replace(manifest, recipe={**manifest.recipe, "num_samples": ROWS - 1}, arrays=arrays)
    )
    with pytest.raises(
        CacheDamagedError, match=r"samples\.parquet: expected 9 rows, got 10; run dtcache verify"
    ):
        CacheReader(root, allow="incomplete")


def test_failed_row_is_not_usable(shared: Path) -> None:
    """The failed row keeps its position, reads as zeros and is the only unusable row."""
    reader = CacheReader(shared)
    assert reader.usable_rows.tolist() == [row for row in range(ROWS) if row != FAILED_ROW]
    for name in NAMES:
        assert not read(reader, name, [FAILED_ROW], [0]).any()


def test_flipped_bytes_of_every_shard_are_found(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped byte of a shard raises CacheDamagedError with the key of each sample it affects.

    If damage is allowed, all other samples read as before.
    """
    monkeypatch.setattr(reader_module, "open_limit", lambda: 0)
    reader = CacheReader(root, allow="damage")
    wanted = read_all(reader)
    for name, array, number, path in shard_files(root):
        content = path.read_bytes()
        entries = array.shard_rows * array.payloads_per_row
        index_at = len(content) - index_bytes(entries)
        index = parse_index(content[index_at:], array, len(content))[
            : len(array.rows_of(number)) * array.payloads_per_row
        ]
        checksums = {int(end) - 1 - i for end in index.sum(1) for i in range(4)}
        pairs = [(row, view) for row in array.rows_of(number) for view in range(views_of(name))]
        # test_shard.py flips every byte; here a subset still covers every sample's chunk and the
        # index.
        for place in range(number, len(content), 11 if name == IMAGES else 3):
            with open(path, "r+b") as file:
                file.seek(place)
                file.write(bytes([content[place] ^ (1 << place % 8)]))
            messages = {}
            reader._indices = {n: ChunkIndex(a) for n, a in reader.manifest.arrays.items()}
            for row, view in pairs:
                try:
                    found = read(reader, name, [row], [view])
                except CacheDamagedError as error:
                    messages[row, view] = str(error)
                else:
                    assert (found[0] == wanted[name][row * views_of(name) + view]).all()
            if place >= index_at:
                assert len(messages) == len(pairs)
                assert all(m.startswith(f"{path}: ") for m in messages.values())
                assert all("the shard's index is damaged" in m for m in messages.values())
            elif place not in checksums:  # the tag has proved the content; Zarr compares both
                [((row, view), message)] = messages.items()
                key = tiny_plan().samples[row].key
                assert (
                    f"{path}: sample {key} of {name}, view {view}: the checksum does not match"
                    in message
                )
            path.write_bytes(content)
    np.testing.assert_equal(read_all(CacheReader(root)), wanted)


@pytest.mark.parametrize("what", ["gone", "empty", "one byte short", "one byte long", "a folder"])
def test_missing_and_resized_shards_are_found_at_open(root: Path, what: str) -> None:
    """Opening a cache names a shard that is missing, empty or of another size."""
    for _, _, _, path in shard_files(root):
        content = path.read_bytes()
        path.unlink()
        if what == "a folder":
            path.mkdir()
        elif what != "gone":
            path.write_bytes(
                {"empty": b"", "one byte short": content[:-1], "one byte long": content + b"\0"}[
                    what
                ]
            )
        got = {"gone": "no file", "a folder": "no file", "empty": "0 bytes"}.get(what, r"\d+ bytes")
        with pytest.raises(
            CacheDamagedError,
            match=rf"{path}: expected {len(content)} bytes, got {got}; run dtcache",
        ):
            CacheReader(root)
        if what == "a folder":
            path.rmdir()
        path.write_bytes(content)
    CacheReader(root)


@pytest.mark.parametrize(
    "opened", [False, True], ids=["before its index is read", "after its index is read"]
)
@pytest.mark.parametrize("what", ["gone", "empty", "short", "zeros"])
def test_damage_after_open_is_found_at_read(root: Path, what: str, opened: bool) -> None:
    """A shard that changes after the cache was opened raises CacheDamagedError at its next read."""
    reader = CacheReader(root)
    if opened:
        read(reader, FEATURES, [0], [0])
    path = root / "data.zarr" / FEATURES / "c.0.0.0"
    size = path.stat().st_size
    if what == "gone":
        path.unlink()
        if opened:  # POSIX: an open file stays readable after unlink
            assert read(reader, FEATURES, [3], [1]).any()
            return
    else:
        with open(path, "r+b") as file:
            file.truncate({"empty": 0, "short": 40, "zeros": 0}[what])
            if what == "zeros":
                file.truncate(size)
    with pytest.raises(CacheDamagedError, match=r"c\.0\.0\.0"):
        read(reader, FEATURES, [3], [1])


def test_swapped_shards_are_found_when_they_differ_in_size(root: Path) -> None:
    """Two exchanged shards of different sizes, within or across arrays, are reported at open."""
    files = [path for *_, path in shard_files(root)]
    for first in files:
        for second in files:
            if first < second and first.stat().st_size != second.stat().st_size:
                a = first.read_bytes()
                b = second.read_bytes()
                first.write_bytes(b)
                second.write_bytes(a)
                with pytest.raises(
                    CacheDamagedError,
                    match=r"expected .* bytes, got .* bytes; run dtcache verify on the cache",
                ):
                    CacheReader(root)
                first.write_bytes(a)
                second.write_bytes(b)


def test_every_other_file_is_hashed_at_open(root: Path) -> None:
    """A changed or missing zarr.json, codec file or Parquet file is named at open."""
    files = [name for name in CacheReader(root).manifest.files]
    assert {"codec.safetensors.zst", "data.zarr/zarr.json", "samples.parquet"} < set(files)
    for name in files:
        path = root / name
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(
            CacheDamagedError, match=rf"{name}: missing or not as the manifest says; run dtcache"
        ):
            CacheReader(root)
        path.unlink()
        with pytest.raises(
            CacheDamagedError, match=rf"{name}: missing or not as the manifest says"
        ):
            CacheReader(root)
        path.write_bytes(content)


def test_reading_changes_nothing(root: Path) -> None:
    """Opening and reading a cache changes no byte and no file name."""
    before = tree(root)
    read_all(CacheReader(root))
    assert tree(root) == before


def test_incomplete_and_missing_caches(tmp_path: Path) -> None:
    """An incomplete cache and a folder without a cache raise two different errors."""
    begin(tmp_path / "cache", tiny_plan())
    with pytest.raises(
        CacheIncompleteError,
        match="the cache is not complete; run its dtcache extract command again",
    ):
        CacheReader(tmp_path / "cache")
    with pytest.raises(CacheNotFoundError, match=r"is not a cache: expected manifest\.json in it"):
        CacheReader(tmp_path)
    with pytest.raises(CacheNotFoundError, match="nowhere is not a cache"):
        CacheReader(tmp_path / "nowhere")


def test_what_is_committed_of_an_incomplete_cache_can_be_read(shared: Path, tmp_path: Path) -> None:
    """With `allow="incomplete"`, committed rows read as if sealed and all others are refused."""
    plan = tiny_plan()
    writer = begin(tmp_path / "cache", plan)
    for number in (0, 2):
        writer.write_shard(plan.shards[number])
    reader = CacheReader(tmp_path / "cache", allow="incomplete")
    whole = CacheReader(shared)
    rows = [0, 1, 2, 3, 8, 9]
    assert reader.usable_rows.tolist() == rows
    assert reader.samples.take(rows).equals(whole.samples.take(rows))
    assert set(reader.samples.take(range(4, 8))["failure"].to_pylist()) == {"not extracted yet"}
    for name in NAMES:
        assert np.array_equal(read(reader, name, rows, [0] * 6), read(whole, name, rows, [0] * 6))
    with pytest.raises(
        CacheDamagedError, match="the shard was not committed yet when the cache was opened"
    ):
        read(reader, FEATURES, [4], [0])
    assert pickle.loads(pickle.dumps(reader)).usable_rows.tolist() == rows
    assert read_all(CacheReader(shared, allow="incomplete")).keys() == read_all(whole).keys()


@pytest.mark.parametrize("step", ["file_problem", "committed"])
def test_a_cache_that_is_sealed_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A seal during the opening of an incomplete cache is not reported as damage."""
    plan = tiny_plan()
    writer = begin(tmp_path / "cache", plan)
    for number in writer.missing:
        writer.write_shard(plan.shards[number])
    real = getattr(reader_module, step)
    calls = []

    def meanwhile(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            writer.seal()
        return real(*arguments)

    monkeypatch.setattr(reader_module, step, meanwhile)
    reader = CacheReader(tmp_path / "cache", allow="incomplete")
    assert calls and reader.manifest.state == "sealed"
    assert reader.usable_rows.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_commit_records_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening an incomplete cache reads each commit record once."""
    plan = tiny_plan()
    writer = begin(tmp_path / "cache", plan)
    for number in (0, 2):
        writer.write_shard(plan.shards[number])
    real = commits_module.read_commit
    read_paths = []
    monkeypatch.setattr(
        commits_module, "read_commit", lambda path: read_paths.append(path.name) or real(path)
    )
    CacheReader(tmp_path / "cache", allow="incomplete")
    assert read_paths == ["000000.json", "000002.json"]


def test_an_incomplete_cache_with_damage_is_refused(tmp_path: Path) -> None:
    """A short committed shard and a record of another cache are reported at open."""
    plan = tiny_plan()
    root = tmp_path / "cache"
    begin(root, plan).write_shard(plan.shards[0])
    path = root / plan.arrays[FEATURES].object_path(0)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(
        CacheDamagedError, match=rf"expected {len(data)} bytes, got {len(data) - 1} bytes"
    ):
        CacheReader(root, allow="incomplete")
    damaged = CacheReader(root, allow="damage")
    assert list(damaged.damaged) == [plan.arrays[FEATURES].object_path(0)]
    assert damaged.usable_rows.tolist() == []
    assert pickle.loads(pickle.dumps(damaged)).usable_rows.tolist() == []
    path.write_bytes(data)
    record = replace(read_commits(root)[0], fingerprint="0" * 64)
    write_commit(root, record)
    with pytest.raises(CacheDamagedError, match="the record belongs to another cache"):
        CacheReader(root, allow="incomplete")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"failures": (FailedSample(row=4, key="k", reason="none"),)},
            "expected failures of rows 0 to 3, got row 4",
        ),
        (
            {"failures": (FailedSample(row=1 << 60, key="k", reason="none"),)},
            "expected failures of rows 0 to 3, got row",
        ),
        ({"content_sha256": (None,) * 5}, "expected 4 rows, got 5"),
        ({"content_sha256": (None,) * 3}, "expected 4 rows, got 3"),
    ],
)
def test_a_record_of_rows_outside_its_shard_is_damage(
    tmp_path: Path, changes: dict, reason: str
) -> None:
    """The reader, a resume and inspect refuse a record whose rows do not match its shard."""
    plan = tiny_plan()
    root = tmp_path / "cache"
    writer = begin(root, plan)
    for made in plan.shards:
        writer.write_shard(made)
    write_commit(root, replace(read_commits(root)[0], **changes))
    reason = f"000000.json: {reason}.*; delete it and run dtcache extract again"
    with pytest.raises(CacheDamagedError, match=reason):
        CacheReader(root, allow="incomplete")
    with pytest.raises(CacheDamagedError, match=reason):
        CacheWriter.resume(root)
    [damage] = read_contents(root).damage
    assert damage.path == "commits/000000.json"
    assert re.search(reason, f"000000.json: {damage.reason}")


def test_absent_chunk_in_range_is_damage(tmp_path: Path) -> None:
    """A chunk that the shard's intact index lacks raises; absence never reads as zeros."""
    plan = tiny_plan()
    short = replace(
        plan.shards[2],
        payloads={**plan.shards[2].payloads, FEATURES: plan.shards[2].payloads[FEATURES][:-1]},
    )
    root = write_cache(tmp_path / "cache", replace(plan, shards=[*plan.shards[:2], short]))
    reader = CacheReader(root)
    assert read(reader, FEATURES, [9], [0]).any()
    with pytest.raises(
        CacheDamagedError,
        match=rf"sample {plan.samples[9].key} of {FEATURES}, view 1: the shard holds no such",
    ):
        read(reader, FEATURES, [9], [1])


def test_a_replaced_shard_index_is_found(root: Path) -> None:
    """A replaced shards.parquet is detected even if the manifest was edited to match it."""
    table = read_table(root / "shards.parquet", SHARD_SCHEMA)
    (root / "shards.parquet").write_bytes(parquet_bytes(table.slice(0, 5)))
    with pytest.raises(
        CacheDamagedError, match=r"shards\.parquet: missing or not as the manifest says"
    ):
        CacheReader(root)
    manifest = json.loads((root / "manifest.json").read_bytes())
    manifest["files"]["shards.parquet"] = file_sha256(root / "shards.parquet")
    (root / "manifest.json").write_bytes(canonical_json(manifest))
    with pytest.raises(CacheDamagedError, match="its own checksum does not match"):
        CacheReader(root)


def open_below(root: Path) -> list[str]:
    """Return the files of a folder that this process holds open."""
    links = [f"/proc/self/fd/{handle}" for handle in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [target for target in targets if target.startswith(str(root))]


@pytest.mark.parametrize("most", [0, 1, 2])
def test_more_shards_than_open_files(
    shared: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """With more shards than open files allowed, reads are right and the limit is kept."""
    wanted = read_all(CacheReader(shared))
    monkeypatch.setattr(reader_module, "open_limit", lambda: most)
    gc.collect()
    reader = CacheReader(shared)
    rng = np.random.default_rng(most)
    for _ in range(100):
        name = NAMES[rng.integers(2)]
        row = int(rng.integers(ROWS))
        view = int(rng.integers(views_of(name)))
        found = read(reader, name, [row], [view])
        np.testing.assert_array_equal(found[0], wanted[name][row * views_of(name) + view])
        assert len(open_below(shared / "data.zarr")) <= most
    del reader
    assert not open_below(shared / "data.zarr")


@pytest.mark.parametrize("most", [2, 128])
def test_threads_share_one_reader(shared: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Eight threads read the right bytes from one reader while it closes and reopens shards."""
    wanted = read_all(CacheReader(shared))
    monkeypatch.setattr(reader_module, "open_limit", lambda: most)
    reader = CacheReader(shared)
    start = threading.Barrier(8)

    def work(seed: int) -> int:
        rng = np.random.default_rng(seed)
        start.wait()
        for _ in range(40):
            name = NAMES[rng.integers(2)]
            rows = rng.integers(0, ROWS, 6)
            views = rng.integers(0, views_of(name), 6)
            found = read(reader, name, rows, views)
            np.testing.assert_array_equal(found, wanted[name][rows * views_of(name) + views])
        return seed

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(work, range(8))) == list(range(8))


def test_a_reader_travels_as_a_path(shared: Path) -> None:
    """A pickled reader reopens the cache by path and reads the same bytes."""
    reader = CacheReader(shared)
    read(reader, FEATURES, [0], [0])
    message = pickle.dumps(reader)
    assert len(message) < 1000
    np.testing.assert_equal(read_all(pickle.loads(message)), read_all(reader))


def test_a_forked_reader_opens_the_files_again(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader in a forked process reads the same bytes, from files and locks of its own."""
    reader = CacheReader(shared)
    before = read(reader, FEATURES, [0], [0])
    parents = reader._shards
    monkeypatch.setattr(os, "getpid", lambda: -1)
    np.testing.assert_equal(read(reader, FEATURES, [0], [0]), before)
    assert reader._shards is not parents
    assert not parents._files._files.items() & reader._shards._files._files.items()


def test_a_closed_reader_is_refused(shared: Path) -> None:
    """A closed reader has no open file, and reading from it raises CacheError."""
    reader = CacheReader(shared)
    read(reader, FEATURES, [0], [0])
    reader.close()
    assert not reader._shards._files._files
    with pytest.raises(CacheError, match="the cache was closed; open it again"):
        read(reader, FEATURES, [0], [0])


def test_rows_and_views_out_of_range(shared: Path) -> None:
    """A row or view outside the array raises IndexError with the range; negative indices too."""
    reader = CacheReader(shared)
    for rows, views, message in (
        ([ROWS], [0], rf"{FEATURES} has rows 0 to {ROWS - 1}, got {ROWS}"),
        ([0, -1], [0, 0], rf"{FEATURES} has rows 0 to {ROWS - 1}, got -1"),
        ([0], [VIEWS], rf"{FEATURES} has views 0 to {VIEWS - 1}, got {VIEWS}"),
        ([0, 1], [0], r"expected as many views as rows"),
    ):
        with pytest.raises(IndexError, match=message):
            read(reader, FEATURES, rows, views)
    assert len(reader.payloads(FEATURES, [], [])) == 0


@pytest.mark.parametrize("every", [1, 3])
def test_frames_of_other_writers_read_the_same(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Frames of a standard compressor, alone or mixed with ours, read as the same payloads."""
    made = 0

    def pack_frame(payload: bytes, length: int) -> bytes:
        nonlocal made
        made += 1
        return (
            compress(payload.ljust(length, b"\0"), 1)
            if made % every == 0
            else zstd_frame.pack_frame(payload, length)
        )

    monkeypatch.setattr(shard, "pack_frame", pack_frame)
    root = write_cache(tmp_path / "cache", tiny_plan())
    assert made and tree(root) != tree(shared)
    np.testing.assert_equal(read_all(CacheReader(root)), read_all(CacheReader(shared)))


def test_a_process_that_may_open_no_more_files_is_told_so(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running out of file descriptors names the limit and is not reported as damage."""
    reader = CacheReader(root)

    def refuse(path: object, flags: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        CacheError, match=r"c\.0.*: Too many open files; raise the limit \(ulimit -n\)"
    ) as caught:
        reader.payloads(FEATURES, [0], [0])
    assert not isinstance(caught.value, CacheDamagedError)
