"""Experiment trackers, which display a run's metrics: TensorBoard, W&B, MLflow, Trackio, or none.

A tracker's package is imported only if `log_with` names it. `RUN/tracker.json` holds the id of a
tracker's run, so that a resumed run continues the same one.
"""

import importlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from dtcache.atomic_files import write_file
from dtcache.errors import CacheDamagedError, ConfigError, DtcacheError, TrainingError, one_line
from dtcache.json_files import read_json
from dtcache.recipe import Json
from pipelines.runs.folder import TENSORBOARD, TRACKER

MAX_TRACKER_BYTES = 1 << 16
PROJECT = "dtcache"
"""Default project, or MLflow experiment; the tracker's environment variable overrides it."""


class Tracker(Protocol):
    """Displays the metrics of one run."""

    def log(self, line: Json) -> None:
        """Add the metrics of one step; `line` maps names to numbers, and has the `step`."""

    def flush(self) -> None:
        """Write buffered metrics, if the tracker lets its caller decide when."""

    def close(self, failed: bool) -> None:
        """End the run, as a failed one if `failed`."""


def require_tracker(kind: str) -> None:
    """Raise ConfigError if the tracker `kind`, a value of `log_with`, is not installed."""
    if kind not in ("none", "tensorboard"):
        _imported(kind)


def open_tracker(kind: str, out: Path, step: int, config: Json) -> Tracker:
    """Start or resume the tracker's run of the run folder `out`, after `step`.

    `kind` is a value of the option `log_with`, `config` the run's options by name. Raises
    ConfigError if the tracker is not installed, TrainingError if it cannot start.
    """
    if kind == "none":
        return NoTracker()
    config = json.loads(json.dumps(config, default=str))
    if kind == "tensorboard":
        return TensorBoardTracker(out, step)
    start: dict[str, Callable[[Any, Path, Json], Tracker]] = {
        "wandb": WandbTracker,
        "mlflow": MlflowTracker,
        "trackio": TrackioTracker,
    }
    module = _imported(kind)
    try:
        return start[kind](module, out, config)
    except DtcacheError:
        raise
    except Exception as error:
        # Each tracker has exceptions of its own: for the network, its server, its settings.
        raise TrainingError(
            f"{kind} could not start: {one_line(error)}; check its settings, or pass another "
            "`log_with`"
        ) from error


class NoTracker:
    """Displays nothing."""

    def log(self, line: Json) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self, failed: bool) -> None:
        """Do nothing."""


class TensorBoardTracker:
    """Event files in `RUN/tensorboard`. Events of steps that a resumed run repeats are hidden."""

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / TENSORBOARD), purge_step=step + 1)

    def log(self, line: Json) -> None:
        """Add one scalar per metric."""
        for name, value in line.items():
            self._writer.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        """Write the events to the disk."""
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run in the project of `WANDB_PROJECT`, else `dtcache`.

    A resumed run repeats some steps; W&B ignores lines of steps that it already has.
    """

    def __init__(self, wandb: Any, out: Path, config: Json) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=out.name,
            id=_run_id(out, "wandb") or _new_run_id(out, "wandb"),
            resume="allow",
            dir=str(out),
            config=config,
        )

    def log(self, line: Json) -> None:
        """Add one history row; lines of the same step are merged."""
        self._run.log(_metrics(line), step=line["step"])

    def flush(self) -> None:
        """Do nothing: W&B uploads in the background."""

    def close(self, failed: bool) -> None:
        """Upload the rest and end the run."""
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """An MLflow run in the experiment of `MLFLOW_EXPERIMENT_NAME`, else `dtcache`."""

    def __init__(self, mlflow: Any, out: Path, config: Json) -> None:
        self._mlflow = mlflow
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            mlflow.set_experiment(PROJECT)
        run_id = _run_id(out, "mlflow")
        run = mlflow.start_run(run_id=run_id, run_name=out.name)
        if run_id is None:
            _store_run_id(out, "mlflow", run.info.run_id)
            # MLflow refuses to change a parameter, and some options may change on resume.
            mlflow.log_params(config)

    def log(self, line: Json) -> None:
        """Add one value per metric."""
        self._mlflow.log_metrics(_metrics(line), step=line["step"])

    def flush(self) -> None:
        """Do nothing: MLflow writes each line at once."""

    def close(self, failed: bool) -> None:
        """End the run."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class TrackioTracker:
    """A Trackio run in the project of `TRACKIO_PROJECT`, else `dtcache`; its name is its id."""

    def __init__(self, trackio: Any, out: Path, config: Json) -> None:
        self._trackio = trackio
        run_id = _run_id(out, "trackio") or _new_run_id(out, "trackio")
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{out.name}-{run_id[:8]}",
            config=config,
            resume="allow",
        )

    def log(self, line: Json) -> None:
        """Add one line of metrics."""
        self._trackio.log(_metrics(line), step=line["step"])

    def flush(self) -> None:
        """Do nothing: Trackio writes in the background."""

    def close(self, failed: bool) -> None:
        """Write the rest and end the run."""
        self._trackio.finish()


def _imported(kind: str) -> Any:
    """Import an optional tracker. Raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise ConfigError(
            f"`log_with` {kind}: {kind} is not installed; run pip install 'dtcache[{kind}]', or "
            "pass another `log_with`"
        ) from error


def _metrics(line: Json) -> Json:
    return {name: value for name, value in line.items() if name != "step"}


def _run_ids(out: Path) -> dict[str, str]:
    path = out / TRACKER
    try:
        ids = read_json(path, MAX_TRACKER_BYTES) if path.exists() else {}
        if not all(isinstance(run_id, str) for run_id in ids.values()):
            raise ValueError("expected text for every id")
    except (OSError, ValueError) as error:
        raise CacheDamagedError(
            f"{path}: not the ids of runs ({one_line(error)}); delete it to start a new run of the "
            "tracker"
        ) from error
    return ids


def _run_id(out: Path, kind: str) -> str | None:
    """Return the id of the tracker's run that this run folder belongs to, if there is one."""
    return _run_ids(out).get(kind)


def _store_run_id(out: Path, kind: str, run_id: str) -> None:
    ids = {**_run_ids(out), kind: run_id}
    write_file(out / TRACKER, json.dumps(ids, indent=1).encode())


def _new_run_id(out: Path, kind: str) -> str:
    run_id = uuid.uuid4().hex
    _store_run_id(out, kind, run_id)
    return run_id
