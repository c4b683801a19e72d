"""The report of a student's run: options, curves and results, from its JSON files alone."""

from pathlib import Path

from dtcache.errors import CacheDamagedError, ConfigError
from dtcache.json_files import read_json
from dtcache.recipe import Json
from dtcache.store.summary import SCHEMA
from pipelines.runs.folder import RUN, SUMMARY, read_summary
from pipelines.runs.metrics import read_metrics

MAX_BYTES = 256 << 20
HELD_OUT = "held_out/"
HELD_OUT_AVERAGE = "held_out_ema/"


def is_run(path: Path) -> bool:
    """Return whether a folder is the folder of a run."""
    return (path / RUN).is_file()


def inspect_run(root: Path) -> Json:
    """Describe a student's run, finished or not.

    Returns JSON values. `results` are those of the exported weights, and None until the run is
    finished. `curves` has steps and values by name, such as `held_out/mse/t50/stride8`; the curves
    of the EMA are `held_out_ema/...`. Raises CacheDamagedError if a file does not have the form
    that `dtcache train` writes, and ConfigError if another command wrote the run.
    """
    options = _read_object(root / RUN)
    if "student" not in options:
        raise ConfigError(
            f"{root / RUN}: not the options of dtcache train; pass the folder of a student's run"
        )
    finished = (root / SUMMARY).is_file()
    results = read_summary(root) if finished else None
    curves = _curves(root)
    return {
        "schema": SCHEMA,
        "kind": "run",
        "state": "finished" if finished else "unfinished",
        "steps": max((steps[-1] for steps, _ in curves.values()), default=0),
        "options": options,
        "weights": "average" if options.get("ema_decay") is not None else "last",
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
    """Return a held-out curve, such as `mse/t50/stride8`, of the exported weights, or None."""
    prefix = HELD_OUT_AVERAGE if report["weights"] == "average" else HELD_OUT
    curve: Json | None = report["curves"].get(prefix + name)
    return curve


def _read_object(path: Path) -> Json:
    try:
        return read_json(path, MAX_BYTES)
    except (ValueError, OSError) as error:
        raise CacheDamagedError(
            f"{path}: not readable as JSON ({error}); run the training again"
        ) from error


def _curves(root: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and values of every metric, up to a line that was not written to its end."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in read_metrics(root):
        for name, value in line.items():
            if name != "step":
                steps, numbers = curves.setdefault(name, ([], []))
                steps.append(line["step"])
                numbers.append(float(value))
    return curves
