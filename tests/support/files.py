"""Helpers that damage files."""

from pathlib import Path


def flip(path: Path, place: int = 3, mask: int = 1) -> None:
    """Flip the bits of `mask` in one byte of a file; a negative position counts from the end."""
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)
