"""Where things lie in a cache, and the Zarr nodes that describe them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.recipe import Json, Recipe, tap_name
from dtcache.store.shard import unpack_chunk
from dtcache.store.zstd_frame import ZSTD_LEVEL

if TYPE_CHECKING:
    from zarr.storage import MemoryStore

MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
SHARDS = "shards.parquet"
COMMITS = "commits"
LOG = "extraction.log.json"
PROMPT = "prompt.safetensors"
CLUSTER_LOG = "cluster.log"
"""What Dask and local workers had to say in the last run that used them; nobody reads it but people."""
DATA = "data.zarr"
LABELS = "labels"
"""Folder of a cache's label sets, each a cache of its own."""
LOGITS = "t0/logits"
"""The one array of a label set: the interpreter adds no noise, as a teacher at timestep 0."""
IMAGES = "images"


@dataclass(frozen=True, kw_only=True, slots=True)
class PayloadArray:
    """A uint8 array of padded payloads: (N, L), or (N, V, L) where every view of a row has one."""

    name: str
    """Path in data.zarr."""
    shape: tuple[int, ...]
    """The last axis is L, the bytes of one padded payload."""
    shard_rows: int
    """Rows of one shard."""

    @property
    def length(self) -> int:
        """L: bytes of one padded payload."""
        return self.shape[-1]

    @property
    def payloads_a_row(self) -> int:
        """Payloads of one row: V, or 1."""
        return math.prod(self.shape[1:-1])

    @property
    def num_shards(self) -> int:
        """Shards of the array."""
        return -(-self.shape[0] // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Return the rows that a shard holds; the last one may be short."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.shape[0]))

    def object_path(self, shard: int) -> str:
        """Return the shard's file, relative to the cache."""
        return f"{DATA}/{self.name}/c.{shard}{'.0' * (len(self.shape) - 1)}"


def tap_names(recipe: Recipe) -> list[str]:
    """Return the arrays of all taps, timestep by timestep, finest first."""
    return [tap_name(t, tap.name) for t in recipe.teacher.timesteps for tap in recipe.teacher.taps]


def payload_arrays(
    recipe: Recipe, image_bound: int, tap_bounds: Mapping[str, int]
) -> dict[str, PayloadArray]:
    """Return all arrays of a cache by name, given the upper bounds of their payloads."""
    count = recipe.num_samples
    rows = recipe.shard_rows
    arrays = {}
    if recipe.images == "view":
        arrays[IMAGES] = PayloadArray(name=IMAGES, shape=(count, image_bound), shard_rows=rows)
    for name in tap_names(recipe):
        arrays[name] = PayloadArray(
            name=name, shape=(count, recipe.num_views, tap_bounds[name]), shard_rows=rows
        )
    return arrays


def write_zarr_nodes(
    root: "Path | MemoryStore",
    arrays: Mapping[str, PayloadArray],
    fit: Mapping[str, Mapping[str, NDArray[np.generic]]],
) -> None:
    """Write the Zarr v3 group at `root`: the payload arrays' metadata, and the codec's arrays whole."""
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec
    from zarr.core.chunk_key_encodings import DefaultChunkKeyEncoding

    group = zarr.create_group(store=root, zarr_format=3)
    checked = (ZstdCodec(level=ZSTD_LEVEL, checksum=False), Crc32cCodec())
    separator = DefaultChunkKeyEncoding(separator=".")
    for array in arrays.values():
        group.create_array(
            array.name,
            shape=array.shape,
            dtype="uint8",
            chunks=(1,) * (len(array.shape) - 1) + (array.length,),
            shards=(array.shard_rows, *array.shape[1:]),
            compressors=checked,
            fill_value=0,
            chunk_key_encoding=separator,
        )
    for tap, fitted in fit.items():
        for name, values in fitted.items():
            node = group.create_array(
                f"codec/{tap}/{name}",
                shape=values.shape,
                dtype=values.dtype,
                chunks=values.shape,
                compressors=checked,
                chunk_key_encoding=separator,
                config={"write_empty_chunks": True},
            )
            node[...] = values


def read_fit(root: Path, tap: str, most: int) -> dict[str, NDArray[np.generic]]:
    """Read one tap's codec arrays, by name, from the Zarr group at `root`: each is one chunk, as it was written.

    Raises ValueError, before any of it is read, for an array of more than `most` bytes of numbers or of other chunks,
    OSError where a chunk cannot be read, and CacheDamagedError where one is not as written.
    """
    import zarr

    found = {}
    for name, array in zarr.open_group(root, mode="r", path=f"codec/{tap}", zarr_format=3).arrays():
        size = array.dtype.itemsize * math.prod(array.shape)
        where = f"codec/{tap}/{name[:40]}"
        if size > most or array.dtype.kind not in "iuf":
            raise ValueError(
                f"{where}: expected at most {most} bytes of numbers, got {size} of {array.dtype.kind!r}"
            )
        if array.chunks != array.shape or array.shards is not None:
            raise ValueError(
                f"{where}: expected one chunk of {array.shape}, got chunks of {array.chunks}"
            )
        described: Json = array.metadata.to_dict()
        coding = [
            (c["name"], c.get("configuration", {}).get("endian")) for c in described["codecs"]
        ]
        if coding not in (
            [("bytes", e), ("zstd", None), ("crc32c", None)] for e in ("little", None)
        ):
            raise ValueError(
                f"{where}: expected codecs bytes (little-endian), zstd and crc32c, got {coding}"
            )
        found[name] = np.empty(array.shape, array.dtype)
        if size > 0:  # where no component lives, nothing was written
            chunk = root / "codec" / tap / name / array.metadata.encode_chunk_key((0,) * array.ndim)
            _read_chunk(chunk, found[name].reshape(-1).view(np.uint8))
    return found


def _read_chunk(chunk: Path, out: NDArray[np.uint8]) -> None:
    # Not by Zarr, whose decoder takes what memory a frame asks for. No frame is twice as long as what it holds.
    with open(chunk, "rb") as file:
        packed = file.read(2 * len(out) + 64)
    try:
        unpack_chunk(packed, out)
    except CacheDamagedError as error:
        raise CacheDamagedError(f"{chunk}: {error}; {AGAIN}") from error
