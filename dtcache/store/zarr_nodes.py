"""The Zarr v3 metadata of a cache's payload arrays."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dtcache.store.layout import DATA, PayloadArray
from dtcache.store.zstd_frame import ZSTD_LEVEL

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer


def zarr_nodes(arrays: Iterable[PayloadArray]) -> dict[str, bytes]:
    """Return every zarr.json of a cache by path: the group's and one per payload array.

    Another version of zarr-python may format a node differently.
    """
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec
    from zarr.core.chunk_key_encodings import DefaultChunkKeyEncoding
    from zarr.storage import MemoryStore

    nodes: dict[str, Buffer] = {}
    group = zarr.create_group(store=MemoryStore(nodes), zarr_format=3)
    for array in arrays:
        group.create_array(
            array.name,
            shape=array.shape,
            dtype="uint8",
            chunks=(1,) * (len(array.shape) - 1) + (array.length,),
            shards=(array.shard_rows, *array.shape[1:]),
            compressors=(ZstdCodec(level=ZSTD_LEVEL, checksum=False), Crc32cCodec()),
            fill_value=0,
            chunk_key_encoding=DefaultChunkKeyEncoding(separator="."),
        )
    return {f"{DATA}/{path}": node.to_bytes() for path, node in nodes.items()}
