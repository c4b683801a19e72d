"""Statistics that were taken before, kept in the user's cache folder; never in a cache."""

import os
import sys
from pathlib import Path

from dtcache.atomic_files import make_folders, write_file
from dtcache.errors import DiskError
from dtcache.hashing import canonical_json, read_json, sha256_json
from dtcache.recipe import Json

MAX_BYTES = 64 << 20


def kept_folder() -> Path:
    """Return where statistics are kept: dtcache/statistics in XDG_CACHE_HOME, by default ~/.cache."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    home = Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"
    return home / "dtcache" / "statistics"


def load_kept(identity: str, asked: Json) -> Json | None:
    """Return what was kept of a manifest under the same options, None where nothing is, or nothing whole."""
    path = _path(identity, asked)
    try:
        value = read_json(path, MAX_BYTES)
        found = value["statistics"]
        whole = value["sha256"] == sha256_json(found) and value["asked"] == asked
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(found) if whole else None


def keep(identity: str, asked: Json, statistics: Json) -> None:
    """Keep statistics; a folder that cannot be written to is told of on stderr, and is no failure."""
    path = _path(identity, asked)
    body = {"asked": asked, "statistics": statistics, "sha256": sha256_json(statistics)}
    try:
        make_folders(path.parent)
        write_file(path, canonical_json(body))
    except (DiskError, OSError) as error:
        print(f"statistics are not kept: {error}", file=sys.stderr)


def _path(identity: str, asked: Json) -> Path:
    return kept_folder() / f"{identity[:32]}-{sha256_json(asked)[:16]}.json"
