"""Statistics saved from earlier calls, in the user's cache folder; never in a feature cache."""

import os
from pathlib import Path

from dtcache.atomic_files import make_folders, write_file
from dtcache.errors import DiskError
from dtcache.hashing import canonical_json, sha256_json
from dtcache.json_files import read_json
from dtcache.recipe import Json
from pipelines.terminal.output import say

MAX_BYTES = 64 << 20


def statistics_folder() -> Path:
    """Return `dtcache/statistics` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    home = Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"
    return home / "dtcache" / "statistics"


def read_statistics(identity: str, request: Json) -> Json | None:
    """Return the saved statistics of a manifest for one request, or None.

    Returns None, too, if the file is unreadable or does not match its own hash.
    """
    path = _path(identity, request)
    try:
        saved = read_json(path, MAX_BYTES)
        statistics = saved["statistics"]
        intact = saved["sha256"] == sha256_json(statistics) and saved["asked"] == request
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(statistics) if intact else None


def save_statistics(identity: str, request: Json, statistics: Json) -> None:
    """Save statistics; if the folder is not writable, say so on stderr and go on."""
    path = _path(identity, request)
    body = {"asked": request, "statistics": statistics, "sha256": sha256_json(statistics)}
    try:
        make_folders(path.parent)
        write_file(path, canonical_json(body))
    except (DiskError, OSError) as error:
        say(f"statistics are not saved: {error}")


def _path(identity: str, request: Json) -> Path:
    return statistics_folder() / f"{identity[:32]}-{sha256_json(request)[:16]}.json"
