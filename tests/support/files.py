"""Helpers that damage files."""

from pathlib import Path

import numpy as np
from google_crc32c import value as crc32c

from dtcache.store.layout import PayloadArray
from dtcache.store.shard import CRC_BYTES, index_bytes


def flip(path: Path, place: int = 3, mask: int = 1) -> None:
    """Flip the bits of `mask` in one byte of a file; a negative position counts from the end."""
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def exchange_chunks(path: Path, array: PayloadArray, first: int, second: int) -> None:
    """Exchange two entries of a shard's index, under the right checksum."""
    content = path.read_bytes()
    tail = index_bytes(array.shard_rows * array.payloads_per_row)
    index = np.frombuffer(content[-tail:-CRC_BYTES], "<u8").reshape(-1, 2).copy()
    index[[first, second]] = index[[second, first]]
    table = index.tobytes()
    path.write_bytes(content[:-tail] + table + crc32c(table).to_bytes(CRC_BYTES, "little"))
