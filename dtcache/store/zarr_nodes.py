"""The Zarr nodes of a cache, made anew from its manifest and from the codec's chunk files."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from zstandard import ZstdDecompressor

from dtcache.recipe import Json, tap_name
from dtcache.store.contents import file_problem
from dtcache.store.layout import DATA, write_zarr_nodes
from dtcache.store.manifest import CacheManifest
from dtcache.store.shard import CRC_BYTES

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
"""Types of each codec's arrays."""


def zarr_nodes(root: Path, manifest: CacheManifest) -> dict[str, bytes]:
    """Return every zarr.json of a cache by its path, as the writer would write it today; nothing is written.

    The shapes of a tap's codec arrays are found from its chunk files; where one of those is damaged, the nodes of all
    its arrays are left out. Compare the result with the recorded hashes: another zarr-python may word a node otherwise.
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
    """Return a tap's codec arrays, shaped as docs/format.md says; None where a chunk is damaged."""
    flat = {}
    for array, dtype in DTYPES[manifest.recipe["codec"]["name"]].items():
        folder = f"{DATA}/codec/{name}/{array}/"
        chunk = next((path for path in manifest.files if path.startswith(f"{folder}c.")), None)
        if chunk is None:  # an array of no values, of a tap that is never coded
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
