"""JSON files of bounded size, with or without their own hash."""

import json
from pathlib import Path
from typing import Any

from dtcache.hashing import canonical_json, sha256_json
from dtcache.regular_files import read_regular

MAX_VALUES = 1 << 23
"""Most values of a JSON file. As Python objects, they take at most about 600 MB."""


def with_own_hash(value: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with one more field, `sha256`: the hash of all its other fields."""
    return {**value, "sha256": sha256_json(value)}


def read_json(path: Path, limit: int, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Return the JSON object in a file of at most `limit` bytes.

    Raises OSError if the file cannot be read or is not a regular file. Raises ValueError if it is
    larger than `limit`, has more than `max_values` values, is not JSON, is nested too deep or is
    not an object.
    """
    return _parse_object(read_regular(path, limit), max_values)


def read_hashed_json(path: Path, limit: int) -> tuple[dict[str, Any], bool]:
    """Read a JSON object that carries its own hash.

    Returns the object without its `sha256`, and whether the file is intact: its bytes must be
    canonical JSON and its hash must match. Raises the errors of `read_json`.
    """
    content = read_regular(path, limit)
    value = _parse_object(content)
    try:
        canonical = content == canonical_json(value)
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error
    sha256 = value.pop("sha256", None)
    return value, canonical and sha256 == sha256_json(value)


def _parse_object(content: bytes, max_values: int = MAX_VALUES) -> dict[str, Any]:
    num_values = sum(map(content.count, (b",", b"[", b"{")))
    if num_values > max_values:
        raise ValueError(f"expected at most {max_values} JSON values, got {num_values}")
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("not JSON: its values are nested too deep") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value
