"""The Zarr v3 nodes of a cache: written, read, and recomputed from manifest and codec chunks."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from zstandard import ZstdDecompressor

from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.hashing import file_problem
from dtcache.recipe import Json, tap_name
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


def read_fit(root: Path, tap: str, most: int) -> dict[str, NDArray[np.generic]]:
    """Read one tap's codec arrays by name from the Zarr group at `root`; each array is one chunk.

    Raises ValueError, before anything is read, for an array of more than `most` bytes of numbers or
    with other chunks; OSError if a chunk cannot be read; CacheDamagedError if one is damaged.
    """
    import zarr

    arrays = {}
    for name, array in zarr.open_group(root, mode="r", path=f"codec/{tap}", zarr_format=3).arrays():
        size = array.dtype.itemsize * math.prod(array.shape)
        where = f"codec/{tap}/{name[:40]}"
        if size > most or array.dtype.kind not in "iuf":
            raise ValueError(
                f"{where}: expected at most {most} bytes of numbers, got {size} of "
                f"{array.dtype.kind!r}"
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
        arrays[name] = np.empty(array.shape, array.dtype)
        if size > 0:  # nothing is written for an array without values
            chunk = root / "codec" / tap / name / array.metadata.encode_chunk_key((0,) * array.ndim)
            _read_chunk(chunk, arrays[name].reshape(-1).view(np.uint8))
    return arrays


def _read_chunk(chunk: Path, out: NDArray[np.uint8]) -> None:
    # Zarr's decoder would allocate what a frame claims. A frame is at most twice its content.
    with open(chunk, "rb") as file:
        packed = file.read(2 * len(out) + 64)
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
        packed = (root / chunk).read_bytes()[:-CRC_BYTES]
        flat[array] = np.frombuffer(ZstdDecompressor().decompress(packed), dtype)
    shapes: dict[str, tuple[int, ...]] = {
        "basis": (tap["channels"], -1),
        "classes": (-1, tap["height"], tap["width"]),
    }
    if "tables" in flat:
        shapes["tables"] = (len(flat["half_width"]), -1) if len(flat["half_width"]) else (0, 2)
    return {array: values.reshape(shapes.get(array, (-1,))) for array, values in flat.items()}
