"""A whole sweep: ordinary runs, results, resume, failures and the folder's protection."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.cli import run
from support.interrupts import interrupt
from sweep_files import in_process, sweep_text

from dtcache.atomic_files import FolderLock
from dtcache.options import EvaluateOptions, TrainOptions
from dtcache.recipe import ViewSpec
from dtcache.student import Backbone, load_backbone, make_backbone
from pipelines.evaluate.classification import classify
from pipelines.sweep import sweep as stage
from pipelines.sweep.students import OtherBackbone, Source, TrainedStudent
from pipelines.train import trainer


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, no_fsync: None) -> None:
    """Do jobs in this process, which has torch loaded."""
    monkeypatch.setattr(stage, "start_workers", in_process)


@pytest.fixture(scope="module")
def swept(scene_cache: Path, scene_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished sweep `out` of two arms and two seeds, and its file."""
    root = tmp_path_factory.mktemp("sweep")
    (root / "sweep.toml").write_text(sweep_text(scene_cache, scene_folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "start_workers", in_process)
        patch.setattr("os.fsync", lambda handle: None)
        result = run("sweep", root / "sweep.toml", "--out", root / "out")
    assert result.exit_code == 0, result.output
    assert "4 of 4 students are finished" in " ".join(result.output.split())
    return root


def rows_of(out: Path) -> list[dict]:
    """Return the rows of results.parquet."""
    rows: list[dict] = pq.read_table(out / "results.parquet").to_pylist()
    return rows


def stamps(root: Path) -> dict[Path, int]:
    """Return when each file of runs and records was written."""
    files = [*(root / "runs").rglob("*"), *(root / "records").rglob("*")]
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


def copied(swept: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished sweep, to be changed."""
    return Path(shutil.copytree(swept, tmp_path / "copy"))


def edited(root: Path, old: str, new: str) -> Path:
    """Change the sweep file and return its path."""
    path = root / "sweep.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def test_runs_are_ordinary(swept: Path, tmp_path: Path) -> None:
    """inspect and export read every run, trained or a random start."""
    for arm, steps in (("mse", 4), ("random", 0)):
        folder = swept / "out/runs" / arm / "seed-0"
        report = json.loads(run("inspect", folder, "--json").stdout)
        assert (report["state"], report["steps"]) == ("finished", steps)
        assert run("inspect", folder, "--report", tmp_path / f"{arm}.html").exit_code == 0
        exported = run("export", folder, "--out", tmp_path / arm)
        assert exported.exit_code == 0, exported.output


def test_a_random_start_is_what_training_starts_from(swept: Path) -> None:
    """The random start of a seed has the bytes of the trained student's initial backbone."""
    runs = swept / "out/runs"
    for name in ("model.safetensors", "config.json"):
        of_seeds = [
            [
                (runs / arm / name).read_bytes()
                for arm in (f"mse/seed-{s}/init", f"random/seed-{s}/backbone")
            ]
            for s in (0, 1)
        ]
        assert of_seeds[0][0] == of_seeds[0][1]
        assert of_seeds[1][0] == of_seeds[1][1]
        assert name == "config.json" or of_seeds[0] != of_seeds[1]


def test_a_row_per_run_task_and_metric(swept: Path, scene_folder: Path) -> None:
    """Rows have the run's held-out losses and the scores that evaluate gives."""
    rows = rows_of(swept / "out")
    keys = {(r["arm"], r["seed"], r["task"], r["metric"]) for r in rows}
    assert len(keys) == len(rows) == 2 * 2 * (2 + 3)
    assert {r["cpu_seconds"] > 0 for r in rows} == {True}
    assert {r["evaluation_seed"] for r in rows} == {None, 0}
    folder = swept / "out/runs/mse/seed-1"
    held_out = json.loads((folder / "summary.json").read_text())["held_out"]
    by_key = {
        (r["task"], r["metric"]): r["value"] for r in rows if (r["arm"], r["seed"]) == ("mse", 1)
    }
    taps = ("mse/t150/stride4", "mse/t150/stride8")
    assert by_key["training", "mse"] == pytest.approx(sum(held_out[tap] for tap in taps) / 2)
    assert by_key["training", taps[0]] == held_out[taps[0]]
    options = EvaluateOptions(
        train=scene_folder, limit_train=24, limit_test=8, device="cpu", precision="fp32"
    )
    (probed,) = classify(str(folder / "backbone"), options).rows
    assert by_key["probe", "knn_top1"] == probed.knn_top1
    assert by_key["probe", "linear_top1"] == probed.linear_top1


def test_what_is_finished_is_not_done_again(swept: Path) -> None:
    """The same sweep again writes no run and no record, and gives the same results."""
    before = stamps(swept / "out")
    rows = rows_of(swept / "out")
    result = run("sweep", swept / "sweep.toml", "--out", swept / "out")
    assert result.exit_code == 0, result.output
    assert stamps(swept / "out") == before
    assert rows_of(swept / "out") == rows
    dry = run("sweep", swept / "sweep.toml", "--out", swept / "out", "--dry-run")
    assert "0 of 4 jobs left" in dry.output


def test_arms_seeds_and_tasks_may_be_added(swept: Path, tmp_path: Path, scene_folder: Path) -> None:
    """Only what is new is done; a backbone made elsewhere is paired with every seed."""
    root = copied(swept, tmp_path)
    before = stamps(root / "out")
    elsewhere = swept / "out/runs/mse/seed-1"
    arm = f'[[arm]]\nname = "other"\nbackbone = "{elsewhere}"\n[evaluate.probe]'
    edited(root, "[evaluate.probe]", arm)
    task = f"""
[evaluate.scenes]
task = "segmentation"
train = "{scene_folder}"
train_masks = "{scene_folder.parent / "masks"}"
limit_train = 8
limit_test = 8
epochs = 1
device = "cpu"
precision = "fp32"
seeds = [0, 1]
[evaluate.finetuned]
arms = "mse"
finetune = true
train = "{scene_folder}"
limit_train = 16
limit_test = 8
epochs = 1
batch_size = 8
k = 5
device = "cpu"
precision = "fp32"
"""
    path = edited(root, "limit_train = 24", "limit_train = 24")
    path.write_text(path.read_text() + task)
    dry = run("sweep", path, "--out", root / "out", "--dry-run")
    assert "5 of 5 jobs left" in dry.output
    assert re.search(
        r"in total: over \d+ s, one job after the other; the time of 13 steps is unk",
        " ".join(dry.output.split()),
    )
    result = run("sweep", path, "--out", root / "out")
    assert result.exit_code == 0, result.output
    after = stamps(root / "out")
    assert {file: after[file] for file in before} == before
    probed = ("probe", "linear_top1")
    rows = [r for r in rows_of(root / "out") if (r["task"], r["metric"]) == probed]
    same = [r["value"] for r in rows if (r["arm"], r["seed"]) == ("mse", 1)]
    assert [r["value"] for r in rows if r["arm"] == "other"] == same
    scenes = [r for r in rows_of(root / "out") if (r["arm"], r["metric"]) == ("mse", "miou")]
    assert sorted((r["seed"], r["evaluation_seed"]) for r in scenes) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    finetuned = [r for r in rows_of(root / "out") if r["task"] == "finetuned"]
    assert {r["metric"] for r in finetuned} == {
        "knn_top1",
        "linear_top1",
        "finetuned_top1",
        "finetuned_top5",
    }
    report = (root / "out/report.md").read_text()
    assert "scenes: mean IoU" in report and "finetuned: finetuned top-5, per cent" in report


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 2", "epochs = 3", r"arm mse, seed 0: was done with another epochs: expected 2"),
        ("limit_test = 8", "limit_test = 9", r"arm mse, seed 0, probe (seed 0): was done with ano"),
        ('loss = "mse"', 'loss = "at"', r"arm mse, seed 0: was done with another loss: expected"),
        ('name = "mse"', 'name = "new"', None),
        ("num_workers", "num_workers", None),
    ],
)
def test_a_changed_option_is_refused(
    swept: Path, tmp_path: Path, old: str, new: str, message: str | None
) -> None:
    """A changed option of a finished run is refused with arm and field; others may change."""
    root = copied(swept, tmp_path)
    before = stamps(root / "out")
    edited(root, "epochs = 2", "epochs = 2\nnum_workers = 1")
    path = edited(root, old, new)
    result = run("sweep", path, "--out", root / "out", *(["--dry-run"] if message is None else []))
    assert result.exit_code == (0 if message is None else 2), result.output
    assert message is None or f"Error: {message}" in result.output
    assert stamps(root / "out") == before


def test_a_cache_that_changed_is_refused(swept: Path, tmp_path: Path, tiny_cache: Path) -> None:
    """Another cache at the same place is refused before anything runs."""
    root = copied(swept, tmp_path)
    text = (root / "sweep.toml").read_text()
    old = text.split('path = "')[1].split('"')[0]
    path = edited(root, old, str(tiny_cache))
    result = run("sweep", path, "--out", root / "out")
    assert result.exit_code == 2
    assert "Error: arm mse, seed 0: was done with another cache: expected" in result.output


def test_a_cache_that_is_missing_is_refused(tmp_path: Path, scene_folder: Path) -> None:
    """A path without a cache is refused before anything runs."""
    (tmp_path / "s.toml").write_text(sweep_text(tmp_path / "no.cache", scene_folder))
    result = run("sweep", tmp_path / "s.toml", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no.cache is not a cache: expected manifest.json" in result.output
    assert not (tmp_path / "out").exists()


def test_a_failed_job_is_reported_and_the_others_go_on(swept: Path, tmp_path: Path) -> None:
    """A failed arm is one line with its log file; the others finish, and the exit code is 1."""
    root = copied(swept, tmp_path)
    shutil.rmtree(root / "out")
    path = edited(root, 'loss = "mse"', 'loss = "mse"\nstudent = "no_such_network"')
    edited(root, "seeds = [0, 1]", "seeds = [0]")
    result = run("sweep", path, "--out", root / "out")
    assert result.exit_code == 1
    line = next(text for text in result.output.splitlines() if text.startswith("failed: "))
    assert line.startswith("failed: runs/mse/seed-0: no_such_network: timm")
    assert line.endswith(f"see {root / 'out/logs/runs/mse/seed-0.log'}")
    assert "1 of 2 students are finished" in " ".join(result.output.split())
    assert {row["arm"] for row in rows_of(root / "out")} == {"random"}
    log = (root / "out/logs/runs/mse/seed-0.log").read_text()
    assert "failed: no_such_network: timm" in log


def test_an_interrupted_run_resumes(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a training keeps what is done; the next sweep ends in the same results."""
    root = copied(swept, tmp_path)
    wanted = rows_of(root / "out")
    shutil.rmtree(root / "out")
    path = edited(root, "log_every = 1", "log_every = 1\nsave_every = 1")
    with monkeypatch.context() as patch:
        interrupt(patch, trainer, "save_checkpoint", 6)
        result = run("sweep", path, "--out", root / "out")
    assert result.exit_code == 130, result.output
    assert "run the same command again to resume" in result.output
    assert {(r["arm"], r["seed"]) for r in rows_of(root / "out")} == {("mse", 0), ("random", 0)}
    record = root / "out/records/runs/mse/seed-1/student.json"
    first = json.loads(record.read_text())
    assert first["result"] is None
    assert run("sweep", path, "--out", root / "out").exit_code == 0
    assert json.loads(record.read_text())["cpu_seconds"] > first["cpu_seconds"]
    times = ("cpu_seconds", "wall_seconds")
    assert [{k: v for k, v in r.items() if k not in times} for r in rows_of(root / "out")] == [
        {k: v for k, v in r.items() if k not in times} for r in wanted
    ]


def test_the_folder_is_protected(swept: Path, tmp_path: Path) -> None:
    """Two sweeps in one folder, and a folder of other files, are refused in one line."""
    root = copied(swept, tmp_path)
    with FolderLock(root / "out"):
        result = run("sweep", root / "sweep.toml", "--out", root / "out")
    assert result.exit_code == 1
    assert "is being written by another process" in result.output
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("precious")
    result = run("sweep", root / "sweep.toml", "--out", tmp_path / "full")
    assert result.exit_code == 2
    assert "is not empty and holds no sweep: found thesis.tex" in result.output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"result": {"knn_top1": "\x1b[2J"}}, "expected knn_top1 of 0 to 100, got"),
        ({"cpu_seconds": float("nan")}, r"not a record of this sweep (cpu_seconds is 'nan')"),
        ({"result": []}, "not a record of this sweep (its result is not an object"),
        ({"identity": None}, "not a record of this sweep ("),
        ({"more": 1}, "not a record of this sweep ("),
        ({"version": ["0"]}, "not a record of this sweep (its version or its commit is not text)"),
    ],
)
def test_a_hostile_record_is_one_line(
    changed: dict[str, Any], message: str, swept: Path, tmp_path: Path
) -> None:
    """A record whose fields have other types or values is refused with its path, in one line."""
    root = copied(swept, tmp_path)
    path = next(p for p in sorted((root / "out").rglob("*.json")) if is_evaluation(p))
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    result = run("sweep", root / "sweep.toml", "--out", root / "out")
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert str(path) in last and message in last and "\x1b" not in result.output


def is_evaluation(path: Path) -> bool:
    """Return whether a file of a sweep is the record of an evaluation."""
    return "train" in json.loads(path.read_text()).get("identity", {}) and "records" in path.parts


def test_a_dry_run_estimates_from_finished_runs_or_timed_steps(swept: Path, tmp_path: Path) -> None:
    """A training is timed if no run of its arm is finished; else the mean of those counts."""
    fresh = run("sweep", swept / "sweep.toml", "--out", tmp_path / "none", "--dry-run")
    assert fresh.exit_code == 0, fresh.output
    assert "4 of 4 jobs left" in fresh.output
    assert re.search(r"in total: over \d+ s", fresh.output)
    assert not (tmp_path / "none").exists()
    root = copied(swept, tmp_path)
    path = edited(root, "seeds = [0, 1]", "seeds = [0, 1, 2]")
    more = run("sweep", path, "--out", root / "out", "--dry-run")
    assert "2 of 6 jobs left" in more.output
    records = [json.loads(file.read_text()) for file in (root / "out/records").rglob("*.json")]
    seconds = sum(record["wall_seconds"] for record in records) / 2
    assert f"in total: {seconds:.0f} s, one job after the other" in more.output


def test_timed_steps_change_nothing(scene_cache: Path, tmp_path: Path) -> None:
    """The estimate of a training is positive, and None for a cache that does not exist yet."""
    options = TrainOptions(
        student="test_resnet",
        student_size="32",
        fpn_width=16,
        batch_size=8,
        epochs=50,
        device="cpu",
        precision="fp32",
    )
    source = Source(where=(scene_cache,), identity={})
    seconds = TrainedStudent(source=source, options=options).seconds()
    assert seconds is not None and seconds > 0
    missing = Source(where=(tmp_path / "none",), identity={})
    assert TrainedStudent(source=missing, options=options).seconds() is None
    assert not any(tmp_path.iterdir())


def test_a_timm_name_is_a_backbone_with_pretrained_weights(
    scene_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are timm's; its view and input size are those of a student of the cache."""
    asked: list[object] = []

    def without_network(name: str, *, init: str | None, seed: int, size: Any) -> Backbone:
        asked.append((name, init, size))
        return make_backbone(name, init=None, seed=seed, size=size)

    monkeypatch.setattr("dtcache.student.make_backbone", without_network)
    source = Source(where=(scene_cache,), identity={})
    options = TrainOptions(batch_size=8, device="cpu", precision="fp32")
    OtherBackbone(backbone="test_resnet", options=options, source=source).make(tmp_path / "run")
    assert asked == [("test_resnet", "pretrained", (32, 32))]
    backbone, size, view = load_backbone(tmp_path / "run/backbone")
    assert (backbone.name, size) == ("test_resnet", (32, 32))
    assert view == ViewSpec(height=32, width=32)


def test_arms_of_a_cache_and_seed_share_a_loader(swept: Path, tmp_path: Path) -> None:
    """Students on one loader have the losses that they have alone; one that fails ends alone."""
    root = copied(swept, tmp_path)
    shutil.rmtree(root / "out")
    edited(root, "seeds = [0, 1]", "seeds = [0]\nshare = true")
    arm = '[[arm]]\nname = "wild"\ncache = "scenes"\n[arm.train]\nlr = 1e30\n'
    path = edited(root, "[[arm]]", f"{arm}[[arm]]")
    dry = run("sweep", path, "--out", root / "out", "--dry-run")
    assert "2 of 2 jobs left" in dry.output
    assert "runs/wild+1/seed-0" in dry.output
    result = run("sweep", path, "--out", root / "out")
    assert result.exit_code == 1
    line = "failed: runs/wild+1/seed-0: arm wild, seed 0: the loss is not finite at step"
    assert line in result.output
    mean = [row for row in rows_of(root / "out") if row["metric"] == "mse"]
    assert {row["arm"]: row["shared"] for row in mean} == {"mse": 2, "random": 1}
    alone = json.loads((swept / "out/runs/mse/seed-0/summary.json").read_text())
    together = json.loads((root / "out/runs/mse/seed-0/summary.json").read_text())
    assert together["held_out"] == alone["held_out"]


def test_a_student_that_cannot_be_built_does_not_stop_those_of_its_loader(
    swept: Path, tmp_path: Path
) -> None:
    """The others of its loader are trained and evaluated; the failure names the network."""
    root = copied(swept, tmp_path)
    shutil.rmtree(root / "out")
    edited(root, "seeds = [0, 1]", "seeds = [0]\nshare = true")
    arm = '[[arm]]\nname = "bad"\ncache = "scenes"\n[arm.train]\nstudent = "no_such_network"\n'
    path = edited(root, "[[arm]]", f"{arm}[[arm]]")
    result = run("sweep", path, "--out", root / "out")
    assert result.exit_code == 1
    assert "failed: runs/bad+1/seed-0: arm bad, seed 0: no_such_network: timm" in result.output
    assert {row["arm"] for row in rows_of(root / "out")} == {"mse", "random"}
