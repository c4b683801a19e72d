"""A run folder's file names, and the record of the run's identity. Imports no torch."""

import json
from collections.abc import Collection
from pathlib import Path

from dtcache.atomic_files import disk_errors, write_file
from dtcache.errors import CacheDamagedError, CacheMismatchError
from dtcache.recipe import Json

RUN = "run.json"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
CONFIG = "config.toml"
SUMMARY = "summary.json"
CURVES = "curves.png"
TENSORBOARD = "tensorboard"
TRACKER = "tracker.json"


def claim_run(out: Path, identity: Json, volatile: Collection[str]) -> None:
    """Record a run's identity in `out/run.json`, or check that the run there is the same one.

    Fields named in `volatile` may differ when a run is resumed. Raises CacheMismatchError, naming
    the field, if the folder holds a different run, or if it holds other files and no run.
    """
    path = out / RUN
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    identity = json.loads(json.dumps(identity, default=str))
    if not path.exists():
        foreign = sorted(p.name for p in out.iterdir() if p.name != ".lock")
        if foreign:
            raise CacheMismatchError(
                f"{out} is not empty and holds no run: found {foreign[0]}; pass a new `out`"
            )
        write_file(path, json.dumps(identity, indent=1).encode())
        return
    try:
        recorded = json.loads(path.read_text())
    except ValueError as error:
        raise CacheDamagedError(f"{path}: not JSON ({error}); pass another `out`") from error
    for name, value in identity.items():
        if name not in volatile and recorded.get(name) != value:
            raise CacheMismatchError(
                f"{out} holds a run with another `{name}`: expected {recorded.get(name)!r}, "
                f"got {value!r}; pass the same options to resume that run, or another `out`"
            )
