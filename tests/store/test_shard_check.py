"""A process compares each shard file with its SHA-256 once, before any of its payloads is used."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store.builders import FEATURES, ROWS, VIEWS, begin, tiny_plan, write_cache
from support.files import flip

from dtcache.cache.cache import Cache
from dtcache.errors import CacheDamagedError
from dtcache.store import reader as reader_module
from dtcache.store.layout import IMAGES
from dtcache.store.open_files import OpenFile
from dtcache.store.reader import CacheReader

pytestmark = pytest.mark.usefixtures("no_fsync")


def with_equal_shards(root: Path, *, seal: bool = True) -> tuple[Path, Path]:
    """Write a cache whose first two shards have the same features; return their files.

    The files differ in the tags of the payloads, but not in size.
    """
    plan = tiny_plan()
    same = plan.shards[0].payloads[FEATURES]
    second = replace(plan.shards[1], payloads={**plan.shards[1].payloads, FEATURES: same})
    writer = begin(root, plan)
    for data in (plan.shards[0], second, plan.shards[2]):
        writer.write_shard(data)
    if seal:
        writer.seal()
    first, other = (root / "data.zarr" / FEATURES / f"c.{shard}.0.0" for shard in range(2))
    assert first.stat().st_size == other.stat().st_size
    assert first.read_bytes() != other.read_bytes()
    return first, other


def swap(first: Path, second: Path) -> None:
    """Exchange two files."""
    content = first.read_bytes()
    shutil.copyfile(second, first)
    second.write_bytes(content)


@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize("allow", ["incomplete", "damage"])
def test_swapped_shards_of_equal_size_are_never_read(
    tmp_path: Path, seal: bool, allow: str
) -> None:
    """Two exchanged shard files, each intact, are refused by name, whatever damage is allowed."""
    root = tmp_path / "cache"
    swap(*with_equal_shards(root, seal=seal))
    reader = CacheReader(root, allow=allow)
    for row, file, other in ((0, 0, 1), (4, 1, 0)):
        with pytest.raises(
            CacheDamagedError,
            match=rf"{FEATURES}/c\.{file}\.0\.0: expected SHA-256 [0-9a-f]{{16}}\.\.\., it is "
            rf"data\.zarr/{FEATURES}/c\.{other}\.0\.0; run dtcache verify",
        ):
            reader.payloads(FEATURES, [row], [0])
    assert reader.payloads(IMAGES, [0], [0])[0].any()


def test_no_batch_has_a_swapped_shard(tmp_path: Path) -> None:
    """The loader raises before its first batch, although the batch needs one row of the shard."""
    root = tmp_path / "cache"
    files = with_equal_shards(root)
    assert len(list(Cache(root).loader(batch_size=3))) == 3
    swap(*files)
    with pytest.raises(CacheDamagedError, match=r"it is data\.zarr"):
        next(iter(Cache(root).loader(batch_size=9)))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sealed cache that no test changes."""
    return write_cache(tmp_path_factory.mktemp("shared") / "cache", tiny_plan())


@pytest.fixture
def root(shared: Path, tmp_path: Path) -> Path:
    """A copy of the tiny cache."""
    return Path(shutil.copytree(shared, tmp_path / "cache"))


def test_a_damaged_chunk_is_named_before_its_neighbours_are_used(root: Path) -> None:
    """A shard with one damaged chunk is refused with that chunk's sample, for any of its rows."""
    flip(root / "data.zarr" / FEATURES / "c.0.0.0", 5)
    key = tiny_plan().samples[0].key
    with pytest.raises(
        CacheDamagedError, match=f"sample {key} of {FEATURES}, view 0: the checksum does not match"
    ):
        CacheReader(root).payloads(FEATURES, [3], [1])
    assert CacheReader(root, allow="damage").payloads(FEATURES, [3], [1])[0].any()


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gains the size of each shard file when it is hashed."""
    real = OpenFile.sha256
    sizes: list[int] = []

    def counted(file: OpenFile) -> str:
        sizes.append(file.identity.size)
        return real(file)

    monkeypatch.setattr(OpenFile, "sha256", counted)
    return sizes


def read_all(reader: CacheReader) -> None:
    """Read every row of every array."""
    for name, array in tiny_plan().arrays.items():
        for view in range(array.payloads_per_row):
            reader.payloads(name, np.arange(ROWS), np.full(ROWS, view))


def test_a_file_is_hashed_once_however_often_it_is_opened(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are closed and opened again are hashed again only if they changed."""
    monkeypatch.setattr(reader_module, "open_limit", lambda: 0)
    sizes = hashed(monkeypatch)
    reader = CacheReader(root)
    assert sizes == []
    for _ in range(2):
        read_all(reader)
        assert len(sizes) == 3 * len(tiny_plan().arrays)
    path = root / "data.zarr" / FEATURES / "c.0.0.0"
    os.utime(path, ns=(1, 1))
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    read_all(reader)
    os.replace(copy, path)
    read_all(reader)
    assert sizes[6:] == [path.stat().st_size] * 2
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    copy.write_bytes(content)
    os.replace(copy, path)
    with pytest.raises(CacheDamagedError, match="the checksum does not match"):
        reader.payloads(FEATURES, [3], [1])


def test_threads_share_the_work(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads that read the same rows at the same time hash each file once."""
    sizes = hashed(monkeypatch)
    reader = CacheReader(root)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: read_all(reader), range(4)))
    assert len(sizes) == 3 * len(tiny_plan().arrays)


def test_a_file_that_cannot_be_read_is_tried_again(root: Path) -> None:
    """A shard that was away for a moment is compared when it is back."""
    reader = CacheReader(root)
    path = root / "data.zarr" / FEATURES / "c.0.0.0"
    path.rename(root / "away")
    for _ in range(2):
        with pytest.raises(
            CacheDamagedError, match=r"c\.0\.0\.0: No such file or directory, but the file was"
        ):
            reader.payloads(FEATURES, [0], [VIEWS - 1])
    (root / "away").rename(path)
    assert reader.payloads(FEATURES, [0], [VIEWS - 1])[0].any()


def test_a_fifo_in_place_of_a_shard_is_refused(root: Path) -> None:
    """A shard that became a FIFO after the cache was opened makes no thread wait."""
    reader = CacheReader(root)
    path = root / "data.zarr" / FEATURES / "c.0.0.0"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CacheDamagedError, match=r"c\.0\.0\.0: expected a file, got a FIFO; run"):
        reader.payloads(FEATURES, [0], [0])
