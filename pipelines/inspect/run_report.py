"""What `dtcache inspect` knows of a student's run: its options, its curves, its results. Reads JSON alone."""

import json
from pathlib import Path

from dtcache.errors import CacheDamagedError, ConfigError
from dtcache.hashing import read_json
from dtcache.recipe import Json
from dtcache.store.summary import SCHEMA

RUN = "run.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
MAX_BYTES = 256 << 20
HELD_OUT = "held_out/"
HELD_OUT_AVERAGE = "held_out_ema/"


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a student's run."""
    return (path / RUN).is_file()


def inspect_run(root: Path) -> Json:
    """Describe a student's run, finished or not.

    Returns JSON values: `options` with the fingerprint of the cache, `weights`, `results` of these weights (None until
    it is finished), `curves`: by name, such as `held_out/mse/t50/stride8`, steps and values; with an average there are
    `held_out_ema/...` of it beside those of the last weights. Raises CacheDamagedError where a file is not as
    `dtcache train` writes it, ConfigError where the run is of another command.
    """
    options = _read_object(root / RUN)
    if "student" not in options:
        raise ConfigError(
            f"{root / RUN}: not the options of dtcache train; give the folder of a student's run"
        )
    finished = (root / SUMMARY).is_file()
    results = _read_object(root / SUMMARY) if finished else None
    curves = _curves(root / METRICS)
    return {
        "schema": SCHEMA,
        "kind": "run",
        "state": "finished" if finished else "unfinished",
        "steps": max((steps[-1] for steps, _ in curves.values()), default=0),
        "options": options,
        "weights": "average" if options.get("ema") is not None else "last",
        "results": results,
        "taps": [
            name.removeprefix(f"{HELD_OUT}mse/")
            for name in curves
            if name.startswith(f"{HELD_OUT}mse/")
        ],
        "curves": {
            name: {"steps": steps, "values": values} for name, (steps, values) in curves.items()
        },
    }


def held_out_curve(report: Json, name: str) -> Json | None:
    """Return a held-out curve, such as `mse/t50/stride8`, of the weights that a run exports; None where it has none."""
    title = HELD_OUT_AVERAGE if report["weights"] == "average" else HELD_OUT
    found: Json | None = report["curves"].get(title + name)
    return found


def flat(value: Json, prefix: str = "") -> dict[str, object]:
    """Return a nested object's leaves by dotted path."""
    leaves: dict[str, object] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            leaves |= flat(inner, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = inner
    return leaves


def _read_object(path: Path) -> Json:
    try:
        return read_json(path, MAX_BYTES)
    except (ValueError, OSError) as error:
        raise CacheDamagedError(
            f"{path}: not readable as JSON ({error}); run the training again"
        ) from error


def _curves(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and values of every number in the metrics; a line that a kill cut short ends them."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    if not path.is_file():
        return curves
    if path.stat().st_size > MAX_BYTES:
        raise CacheDamagedError(
            f"{path}: expected at most {MAX_BYTES} bytes, got {path.stat().st_size}"
        )
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        for name, value in values.items():
            if isinstance(value, int | float):
                steps, numbers = curves.setdefault(name, ([], []))
                steps.append(step)
                numbers.append(float(value))
    return curves
