"""Experiment trackers, offline: each receives a run's metrics, and a resumed run continues it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dtcache.errors import CacheDamagedError, ConfigError, TrainingError
from pipelines.runs.metrics import MetricsFile, NoMetrics, read_metrics
from pipelines.runs.trackers import open_tracker, require_tracker

LINES = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "held_out/loss": 1.5}]
CONFIG = {"student": "resnet10t", "images": Path("cats"), "lr": None}


class FakeWandb:
    """The part of wandb that a tracker uses, with the signatures of wandb 0.31."""

    def __init__(self) -> None:
        self.runs: list[SimpleNamespace] = []

    def init(
        self,
        *,
        project: str,
        dir: str,
        id: str,
        name: str,
        config: dict[str, object],
        resume: str,
    ) -> SimpleNamespace:
        run = SimpleNamespace(project=project, id=id, name=name, config=config, resume=resume)
        run.logged = []
        run.log = lambda data, step: run.logged.append((step, data))
        run.finish = lambda exit_code: setattr(run, "exit_code", exit_code)
        self.runs.append(run)
        return run


class FakeMlflow:
    """The part of mlflow that a tracker uses, with the signatures of mlflow 3.17."""

    def __init__(self) -> None:
        self.started: list[tuple[str | None, str]] = []
        self.params: list[dict[str, object]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[str] = []
        self.experiments: list[str] = []

    def set_experiment(self, experiment_name: str) -> None:
        self.experiments.append(experiment_name)

    def start_run(self, run_id: str | None = None, run_name: str | None = None) -> SimpleNamespace:
        self.started.append((run_id, str(run_name)))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "run-of-the-server"))

    def log_params(self, params: dict[str, object]) -> None:
        self.params.append(params)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def end_run(self, status: str = "FINISHED") -> None:
        self.ended.append(status)


class FakeTrackio:
    """The part of trackio that a tracker uses, with the signatures of trackio 0.43."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, str, str]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, project: str, name: str, config: dict[str, object], resume: str) -> None:
        self.runs.append((project, name, resume))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished += 1


def write_run(out: Path, kind: str, step: int = 0) -> None:
    """Write the lines after `step` to a run's metrics and its tracker."""
    out.mkdir(exist_ok=True)
    with MetricsFile(out, step, open_tracker(kind, out, step, CONFIG)) as metrics:
        for line in LINES:
            if line["step"] > step:
                metrics.write(line)
        metrics.flush()


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove this machine's tracker settings from the environment."""
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)


LOGGED = [(1, {"loss": 2.0}), (2, {"loss": 1.0}), (2, {"held_out/loss": 1.5})]


def test_wandb_receives_the_lines_and_resumes_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B receives every line, and a resumed run keeps the run id of the first session."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write_run(tmp_path / "cats", "wandb")
    write_run(tmp_path / "cats", "wandb", step=1)
    first, second = wandb.runs
    assert first.logged == LOGGED and second.logged == LOGGED[1:]
    assert (first.project, first.name, first.resume) == ("dtcache", "cats", "allow")
    assert (
        first.id
        == second.id
        == json.loads((tmp_path / "cats" / "tracker.json").read_text())["wandb"]
    )
    assert first.config == {"student": "resnet10t", "images": "cats", "lr": None}
    assert first.exit_code == 0
    write_run(tmp_path / "dogs", "wandb")
    assert wandb.runs[2].id != first.id


def test_a_failed_run_is_marked_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B and MLflow mark a run that an exception ended as failed."""
    wandb = FakeWandb()
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for kind in ("wandb", "mlflow"):
        tracker = open_tracker(kind, tmp_path, 0, CONFIG)
        with pytest.raises(KeyboardInterrupt), MetricsFile(tmp_path, 0, tracker):
            raise KeyboardInterrupt
    assert wandb.runs[0].exit_code == 1
    assert mlflow.ended == ["FAILED"]


def test_mlflow_receives_the_lines_and_resumes_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow receives every line, and a resumed run does not log its parameters again."""
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    write_run(tmp_path / "cats", "mlflow")
    write_run(tmp_path / "cats", "mlflow", step=1)
    assert mlflow.started == [(None, "cats"), ("run-of-the-server", "cats")]
    assert mlflow.params == [{"student": "resnet10t", "images": "cats", "lr": None}]
    assert mlflow.logged == LOGGED + LOGGED[1:]
    assert mlflow.ended == ["FINISHED", "FINISHED"]
    assert mlflow.experiments == ["dtcache", "dtcache"]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    write_run(tmp_path / "dogs", "mlflow")
    assert mlflow.experiments == ["dtcache", "dtcache"]


def test_trackio_receives_the_lines_and_resumes_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trackio receives every line, and a resume finds the run by its unique name."""
    trackio = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    write_run(tmp_path / "cats", "trackio")
    write_run(tmp_path / "cats", "trackio", step=1)
    assert trackio.runs[0] == trackio.runs[1]
    project, name, resume = trackio.runs[0]
    assert (project, resume) == ("mine", "allow")
    assert name.startswith("cats-") and len(name) == len("cats-") + 8
    assert trackio.logged == LOGGED + LOGGED[1:]
    assert trackio.finished == 2


def test_tensorboard_is_written_beside_the_metrics(tmp_path: Path) -> None:
    """The default tracker writes TensorBoard event files and needs no run id."""
    write_run(tmp_path / "cats", "tensorboard")
    assert list((tmp_path / "cats" / "tensorboard").glob("events.out.tfevents.*"))
    assert not (tmp_path / "cats" / "tracker.json").exists()


def test_no_tracker_leaves_the_metrics_alone(tmp_path: Path) -> None:
    """With `none` a run writes only its metrics file, without the steps that a resume repeats."""
    write_run(tmp_path / "cats", "none")
    assert read_metrics(tmp_path / "cats") == LINES
    write_run(tmp_path / "cats", "none", step=1)
    assert read_metrics(tmp_path / "cats") == LINES
    assert [path.name for path in (tmp_path / "cats").iterdir()] == ["metrics.jsonl"]
    with NoMetrics() as metrics:
        metrics.write(LINES[0])
        metrics.flush()


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing tracker is refused with the command that installs it, and nothing is written."""
    monkeypatch.setitem(sys.modules, kind, None)
    message = rf"`log_with` {kind}: {kind} is not installed; run pip install 'dtcache\[{kind}\]'"
    with pytest.raises(ConfigError, match=message):
        require_tracker(kind)
    with pytest.raises(ConfigError, match=message):
        open_tracker(kind, tmp_path, 0, CONFIG)
    assert not list(tmp_path.iterdir())
    require_tracker("none")
    require_tracker("tensorboard")


def test_a_tracker_that_cannot_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker's own exception, or a damaged tracker.json, becomes an error of one line."""

    def refuse(**settings: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=refuse))
    with pytest.raises(TrainingError, match=r"trackio could not start: no route to host; check"):
        open_tracker("trackio", tmp_path, 0, CONFIG)
    (tmp_path / "tracker.json").write_text("{")
    with pytest.raises(
        CacheDamagedError, match=r"tracker\.json: not the ids of runs .*not JSON.*; delete it"
    ):
        open_tracker("trackio", tmp_path, 0, CONFIG)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a JSON object, got list"),
        ('{"wandb": 3}', "expected text for every id"),
        ("{" + " " * (1 << 16) + "}", "expected at most 65536 bytes, got 65538"),
    ],
)
def test_ids_of_another_size_or_type_are_one_line(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker.json that does not hold the ids of runs is refused, and no run is started."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "tracker.json").write_text(content)
    with pytest.raises(CacheDamagedError, match=rf"tracker\.json: not the ids .*{message}"):
        open_tracker("wandb", tmp_path, 0, CONFIG)
    assert not wandb.runs
