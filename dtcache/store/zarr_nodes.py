"""The Zarr v3 nodes of a cache: written, read, and recomputed from manifest and codec chunks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from zstandard import ZstdDecompressor, get_frame_parameters

from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.hashing import file_problem
from dtcache.json_files import read_json
from dtcache.recipe import Json, tap_name
from dtcache.regular_files import read_regular
from dtcache.store.json_types import check_types
from dtcache.store.layout import DATA, PayloadArray
from dtcache.store.manifest import CacheManifest
from dtcache.store.shard import CRC_BYTES, unpack_chunk
from dtcache.store.zstd_frame import ZSTD_LEVEL

if TYPE_CHECKING:
    from zarr.storage import MemoryStore

DTYPES = {
    "pca-dct-rans": {
        "basis": "<f2",
        "mean": "<f2",
        "classes": "|u1",
        "class_step": "<f4",
        "class_gain": "<f4",
        "class_table": "|u1",
        "tables": "<u2",
        "half_width": "|u1",
    },
    "float16": {"mean": "<f2", "grid": "<i4"},
}
"""Array dtypes by codec."""


MAX_NODE_BYTES = 1 << 20
MAX_CHUNK_BYTES = 1 << 29
"""Most bytes of a codec's array: the basis of 2^14 channels in fp16."""
MOST_CODECS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class _ChunkShape:
    chunk_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _ChunkGrid:
    name: Literal["regular"]
    configuration: _ChunkShape


@dataclass(frozen=True, kw_only=True, slots=True)
class _Coding:
    name: str
    configuration: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _ArrayNode:
    """The fields of an array's zarr.json that a reader needs."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: tuple[int, ...]
    data_type: str
    chunk_grid: _ChunkGrid
    codecs: tuple[_Coding, ...]


def write_zarr_nodes(
    root: "Path | MemoryStore",
    arrays: Mapping[str, PayloadArray],
    fit: Mapping[str, Mapping[str, NDArray[np.generic]]],
) -> None:
    """Write the Zarr v3 group at `root`: metadata of the payload arrays, and the codec's arrays."""
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


def read_fit(root: Path, tap: str, codec: str, most: int) -> dict[str, NDArray[np.generic]]:
    """Read one tap's codec arrays by name from the Zarr group at `root`; each array is one chunk.

    Only the arrays of the codec are read, and by this module: zarr-python would open any file in
    the group. Raises ValueError, before anything is read, for an array of more than `most` bytes of
    numbers or with other chunks; OSError if a file cannot be read; CacheDamagedError if a chunk is
    damaged.
    """
    return {name: _read_array(root, f"codec/{tap}/{name}", most) for name in DTYPES[codec]}


def _read_array(root: Path, where: str, most: int) -> NDArray[np.generic]:
    """Read one array of numbers. Raises the errors of `read_fit`."""
    node = read_json(root / where / "zarr.json", MAX_NODE_BYTES)
    check_types(node, _ArrayNode, where)
    shape = tuple(node["shape"])
    dtype = np.dtype(node["data_type"])
    size = dtype.itemsize * math.prod(shape)
    if not 0 <= size <= most or min(shape, default=0) < 0 or dtype.kind not in "iuf":
        raise ValueError(
            f"{where}: expected at most {most} bytes of numbers, got {size} of {dtype.kind!r}"
        )
    chunks = tuple(node["chunk_grid"]["configuration"]["chunk_shape"])
    if chunks != shape:
        raise ValueError(f"{where}: expected one chunk of {shape}, got chunks of {chunks[:4]}")
    coding = [(c["name"], _endian(c.get("configuration"))) for c in node["codecs"][:MOST_CODECS]]
    if coding not in ([("bytes", e), ("zstd", None), ("crc32c", None)] for e in ("little", None)):
        raise ValueError(
            f"{where}: expected codecs bytes (little-endian), zstd and crc32c, got {coding}"
        )
    values = np.empty(shape, dtype.newbyteorder("<"))
    if size > 0:  # nothing is written for an array without values
        chunk = root / where / f"c{'.0' * len(shape)}"
        _read_chunk(chunk, values.reshape(-1).view(np.uint8))
    return values


def _endian(configuration: Any) -> str | None:
    return configuration.get("endian") if isinstance(configuration, dict) else None


def _read_chunk(chunk: Path, out: NDArray[np.uint8]) -> None:
    # A decoder may allocate what a frame claims. A frame is at most twice its content.
    packed = read_regular(chunk, 2 * len(out) + 64)
    try:
        unpack_chunk(packed, out)
    except CacheDamagedError as error:
        raise CacheDamagedError(f"{chunk}: {error}; {AGAIN}") from error


def zarr_nodes(root: Path, manifest: CacheManifest) -> dict[str, bytes]:
    """Return every zarr.json of a cache by path, as the writer would write it today.

    Writes nothing. The shapes of a tap's codec arrays are derived from the sizes of its chunk
    files; if one of these is damaged, the nodes of all arrays of the tap are left out. Compare the
    result with the recorded hashes: another version of zarr-python may format a node differently.
    """
    from zarr.core.buffer import Buffer
    from zarr.storage import MemoryStore

    fit = {}
    for timestep in manifest.recipe["teacher"]["timesteps"]:
        for tap in manifest.recipe["teacher"]["taps"]:
            name = tap_name(timestep, tap["name"])
            arrays = _codec_arrays(root, manifest, name, tap)
            if arrays is not None:
                fit[name] = arrays
    made: dict[str, Buffer] = {}
    write_zarr_nodes(MemoryStore(made), manifest.arrays, fit)
    return {
        f"{DATA}/{key}": value.to_bytes()
        for key, value in made.items()
        if key.endswith("zarr.json")
    }


def _codec_arrays(
    root: Path, manifest: CacheManifest, name: str, tap: Json
) -> dict[str, NDArray[np.generic]] | None:
    """Return a tap's codec arrays with the shapes of docs/format.md; None if a chunk is damaged."""
    flat = {}
    for array, dtype in DTYPES[manifest.recipe["codec"]["name"]].items():
        folder = f"{DATA}/codec/{name}/{array}/"
        chunk = next((path for path in manifest.files if path.startswith(f"{folder}c.")), None)
        if chunk is None:  # an array without values, of a tap that is never coded
            flat[array] = np.zeros(0, dtype)
            continue
        if file_problem(root / chunk, manifest.files[chunk]) is not None:
            return None
        packed = read_regular(root / chunk, MAX_CHUNK_BYTES)[:-CRC_BYTES]
        size = get_frame_parameters(packed).content_size
        if size > MAX_CHUNK_BYTES:
            return None
        flat[array] = np.frombuffer(ZstdDecompressor().decompress(packed), dtype)
    shapes: dict[str, tuple[int, ...]] = {
        "basis": (tap["channels"], -1),
        "classes": (-1, tap["height"], tap["width"]),
    }
    if "tables" in flat:
        shapes["tables"] = (len(flat["half_width"]), -1) if len(flat["half_width"]) else (0, 2)
    return {array: values.reshape(shapes.get(array, (-1,))) for array, values in flat.items()}
