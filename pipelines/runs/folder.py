"""A run folder's file names, and the record of the run's identity. Imports no torch."""

import json
from collections.abc import Collection
from pathlib import Path

from dtcache.atomic_files import disk_errors, is_system_file, require_no_links, write_file
from dtcache.errors import CacheDamagedError, CacheMismatchError, one_line
from dtcache.json_files import read_json
from dtcache.recipe import Json

RUN = "run.json"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
CONFIG = "config.toml"
SUMMARY = "summary.json"
CURVES = "curves.png"
TENSORBOARD = "tensorboard"
TRACKER = "tracker.json"
BACKBONE = "backbone"
"""Folder of the trained backbone."""
MAX_BYTES = 64 << 20
"""Most bytes of a JSON file of a run."""


def claim_run(out: Path, identity: Json, volatile: Collection[str]) -> None:
    """Record a run's identity in `out/run.json`, or check that the run there is the same one.

    Raises the errors of `require_same_run`, and CacheDamagedError if the folder has links.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    require_no_links(out)
    require_same_run(out, identity, volatile)
    if not (out / RUN).exists():
        write_file(out / RUN, json.dumps(_as_json(identity), indent=1).encode())


def require_same_run(out: Path, identity: Json, volatile: Collection[str]) -> None:
    """Check that the folder `out`, if it exists, is empty or holds this run; write nothing.

    Fields named in `volatile` may differ when a run is resumed. Raises CacheMismatchError, naming
    the field, if the folder holds a different run, or if it holds other files and no run.
    """
    path = out / RUN
    if not path.exists():
        with disk_errors(out):
            files = out.iterdir() if out.exists() else ()
            foreign = sorted(
                p.name for p in files if p.name != ".lock" and not is_system_file(p.name)
            )
        if foreign:
            raise CacheMismatchError(
                f"{out} is not empty and holds no run: found {foreign[0]}; pass a new `out`"
            )
        return
    try:
        recorded = read_json(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise CacheDamagedError(f"{path}: {error}; pass another `out`") from error
    for name, value in _as_json(identity).items():
        if name not in volatile and recorded.get(name) != value:
            raise CacheMismatchError(
                f"{out} holds a run with another `{name}`: expected {recorded.get(name)!r}, "
                f"got {value!r}; pass the same options to resume that run, or another `out`"
            )


def finished_epochs(out: Path) -> int | None:
    """Return the `epochs` of the finished run in a folder; None if there is no such run."""
    if not (out / SUMMARY).is_file() or not (out / RUN).is_file():
        return None
    try:
        epochs = read_json(out / RUN, MAX_BYTES)["epochs"]
    except (OSError, ValueError, KeyError):
        return None
    return epochs if isinstance(epochs, int) else None


def read_summary(out: Path) -> Json:
    """Return the results of a finished run, whose fields have the types that training writes.

    Raises CacheDamagedError.
    """
    path = out / SUMMARY
    try:
        summary = read_json(path, MAX_BYTES)
        for name in ("steps", "seconds", "images_per_second", "wait_share"):
            _require_number(name, summary[name])
        if summary["loss"] is not None:
            _require_number("loss", summary["loss"])
        for name in ("held_out", "noise_floor"):
            for metric, value in summary[name].items():
                _require_number(f"{name} {metric}", value)
        if not isinstance(summary["steps"], int) or summary["steps"] < 0:
            raise ValueError(f"steps is {summary['steps']}")
        if "loss" not in summary["held_out"]:
            raise ValueError("held_out has no loss")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheDamagedError(
            f"{path}: not the summary of a run ({one_line(error)}); train again"
        ) from error
    return summary


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        raise TypeError(f"{name} is {str(value)[:40]!r}, not a number")


def _as_json(identity: Json) -> Json:
    """Return an identity with the types that its file has after it is read again."""
    values: Json = json.loads(json.dumps(identity, default=str))
    return values
