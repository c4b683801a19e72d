"""zarr-python, zarrs and TensorStore read the cached bytes exactly as the writer received them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
import zarrs  # noqa: F401  (registers its codec pipeline)
from store.builders import FEATURES, ROWS, VIEWS, tiny_plan, write_cache, write_nodes

from dtcache.store.layout import DATA, IMAGES, PayloadArray
from dtcache.store.shard import build_shard
from dtcache.store.tag import TAG_BYTES, tagged
from dtcache.store.zstd_frame import MAX_BLOCK

Read = Callable[[Path, str], np.ndarray]


def read_zarr(root: Path, name: str) -> np.ndarray:
    """Read a whole array with zarr-python."""
    return np.asarray(zarr.open_array(root, path=name, mode="r")[...])


def read_zarrs(root: Path, name: str) -> np.ndarray:
    """Read a whole array with zarr-python over the Rust codecs of zarrs."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return np.asarray(zarr.open_array(root, path=name, mode="r")[...])


def read_tensorstore(root: Path, name: str) -> np.ndarray:
    """Read a whole array with TensorStore."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root}/{name}"}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


READERS = pytest.mark.parametrize("read", [read_zarr, read_zarrs, read_tensorstore])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Zarr group of a tiny sealed cache."""
    return write_cache(tmp_path_factory.mktemp("readers") / "cache", tiny_plan()) / "data.zarr"


@READERS
@pytest.mark.parametrize("name", [IMAGES, FEATURES])
def test_payloads_of_a_cache(data: Path, name: str, read: Read) -> None:
    """Every payload reads as written, tagged and padded; the failed row's reads as zeros."""
    plan = tiny_plan()
    array = plan.arrays[name]
    views = 1 if name == IMAGES else VIEWS
    wanted = [
        tagged(array.tag_seed, row, view, plan.payload(name, row, view)).ljust(array.length, b"\0")
        for row in range(ROWS)
        for view in range(views)
    ]
    found = read(data, name)
    assert found.shape == array.shape
    assert found.tobytes() == b"".join(wanted)


@READERS
@pytest.mark.parametrize("length", [16, 255, 256, 65_792, 2 * MAX_BLOCK + 16])
def test_frames_of_every_shape(tmp_path: Path, length: int, read: Read) -> None:
    """Frames of every header size, of several blocks and of a standard compressor all read."""
    rng = np.random.default_rng(length)
    payloads = [
        rng.bytes(size)
        for size in (0, 1, length // 2, length - 1, length, min(length, MAX_BLOCK + 1))
    ]
    payloads += [b"teacher " * (length // 8), bytes(range(16))]
    array = PayloadArray(
        name="t1",
        fingerprint="f" * 64,
        shape=(len(payloads) // 2, 2, length + TAG_BYTES),
        shard_rows=3,
    )
    write_nodes(tmp_path, array)
    for shard in range(array.num_shards):
        rows = array.rows_of(shard)
        content = build_shard(array, shard, payloads[2 * rows.start : 2 * rows.stop])
        (tmp_path / array.object_path(shard)).write_bytes(content)
    contents = read(tmp_path / DATA, array.name)[:, :, TAG_BYTES:]
    assert contents.tobytes() == b"".join(p.ljust(length, b"\0") for p in payloads)
