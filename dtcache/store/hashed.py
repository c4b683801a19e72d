"""JSON files that carry their own hash: manifests, commit records and logs."""

import json
from pathlib import Path

from dtcache.recipe import Json, canonical_json, sha256_json


def read_hashed_json(path: Path, limit: int) -> tuple[Json, bool]:
    """Read a JSON object of at most `limit` bytes; return it less its `sha256`, and whether it is as it was written.

    The bytes must be: JSON has many spellings of one value, and only the canonical one was written. Raises OSError
    where the file cannot be read, and ValueError where it is no JSON object or is larger.
    """
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"expected at most {limit} bytes, got {path.stat().st_size}")
    try:
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, got {type(value).__name__}")
        whole = content == canonical_json(value)
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error
    sha256 = value.pop("sha256", None)
    return value, whole and sha256 == sha256_json(value)
