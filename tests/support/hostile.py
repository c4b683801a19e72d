"""Caches as a stranger could make them: changed at will, with every hash recomputed."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from dtcache.hashing import canonical_json, file_sha256
from dtcache.json_files import with_own_hash
from dtcache.recipe import Json
from dtcache.store.layout import SAMPLES
from dtcache.store.parquet_tables import TablePart, parquet_bytes, parts_of


def reseal(root: Path, change: Callable[[Json], object] = lambda manifest: None) -> None:
    """Apply `change` to a cache's manifest and recompute the hashes of its files and its own."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["sha256"]
    for name in manifest["files"]:
        if (root / name).is_file():
            manifest["files"][name] = file_sha256(root / name)
    samples = root / SAMPLES
    if samples.is_file():
        content = samples.read_bytes()
        try:
            parts = parts_of(io.BytesIO(content))
        except (pa.ArrowException, OSError):
            parts = (TablePart(bytes=len(content), sha256=manifest["files"][SAMPLES]),)
        manifest["samples"] = [asdict(part) for part in parts]
    change(manifest)
    path.write_bytes(canonical_json(with_own_hash(manifest)))


def replace_table(path: Path, table: pa.Table) -> None:
    """Replace a Parquet file of a cache and recompute the hashes of the cache."""
    path.write_bytes(parquet_bytes(table))
    reseal(path.parent)
