"""SHA-256 hashes of files, and of JSON values in canonical form."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dtcache.regular_files import open_regular


def canonical_json(value: Any) -> bytes:
    """Return a JSON value as dtcache hashes it: UTF-8, sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a regular file. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_problem(path: Path, sha256: str | None) -> str | None:
    """Return how a file differs from its recorded SHA-256, or None if the hashes are equal."""
    try:
        got = file_sha256(path)
    except FileNotFoundError:
        return "no file"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None if got == sha256 else f"expected SHA-256 {str(sha256)[:16]}..., got {got[:16]}..."
