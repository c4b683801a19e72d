"""Micro-batches, several processes, EMA and compilation change a run only by rounding."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.cli import run, words
from support.interrupts import interrupt

ROOT = Path(__file__).resolve().parents[3]
FLAGS = words(
    "--student convnext_atto --epochs 2 --batch-size 8 --warmup-epochs 1 --fpn-width 16 "
    "--precision fp32 --device cpu --log-every 1 --student-size 32 --taps 4,8"
)
RTOL = 1e-4
"""Of losses, with another number of processes or micro-batches: sums in another order."""
PLAIN = """
import sys, torch
import cli, dtcache.student
class Alone(torch.nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(1, channels)
torch.nn.BatchNorm2d = Alone
from pipelines.train.trainer import Trainer
real, left = Trainer.update, [int(sys.argv.pop(1))]
def stopping(*arguments):
    left[0] -= 1
    if left[0] < 0:
        raise KeyboardInterrupt
    return real(*arguments)
Trainer.update = stopping
cli.main()
"""


def metric(run_folder: Path, name: str) -> list[float]:
    """Return one metric's values in the order of the steps."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def cache(scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 40 scenes."""
    out = tmp_path_factory.mktemp("scale") / "cache"
    flags = (
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--batch-size",
        8,
        "--shard-rows",
        8,
        "--bytes-per-image",
        4608,
    )
    result = run("extract", scene_folder, "--teacher", teacher_dir, "--out", out, *flags)
    assert result.exit_code == 0, result.output
    return out


class Alone(torch.nn.GroupNorm):
    """A norm that normalises each sample by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


@pytest.fixture
def no_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the regressors' batch norm, whose statistics depend on the micro-batches."""
    # timm binds the class at its first import, so timm's networks keep the real class.
    importlib.import_module("dtcache.student")
    monkeypatch.setattr(torch.nn, "BatchNorm2d", Alone)


@pytest.fixture
def whole(cache: Path, tmp_path: Path, no_batch_norm: None) -> Path:
    """A run in one process with one micro-batch."""
    assert run("train", cache, "--out", tmp_path / "whole", *FLAGS).exit_code == 0
    return tmp_path / "whole"


def test_parts_of_a_batch_take_the_steps_of_the_whole(
    cache: Path, whole: Path, tmp_path: Path
) -> None:
    """--micro-batches 4 gives the undivided batch's losses and weights up to rounding.

    A resume with micro-batches gives the same losses too.
    """
    result = run("train", cache, "--out", tmp_path / "parts", *FLAGS, "--micro-batches", 4)
    assert result.exit_code == 0, result.output
    for name in ("loss", "mse/t150/stride4", "at/t150/stride8", "held_out/loss"):
        np.testing.assert_allclose(metric(tmp_path / "parts", name), metric(whole, name), rtol=RTOL)
    ours, theirs = (
        load_file(p / "backbone" / "model.safetensors") for p in (tmp_path / "parts", whole)
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=1e-4)
    assert run("train", cache, "--out", whole, *FLAGS, "--micro-batches", 2).exit_code == 0


def torchrun(script: Path, processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes over gloo."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(cache: Path, whole: Path, tmp_path: Path) -> None:
    """Two processes give one process's losses within 1e-4, and one process can resume the run.

    Only the first process writes, so each step has one line.
    """
    script = tmp_path / "plain.py"
    out = tmp_path / "two"
    script.write_text(PLAIN)
    flags = (*FLAGS, "--save-every", 1, "--ema-decay", "0.9", "--micro-batches", 2)
    begun = torchrun(script, 2, 3, "train", cache, "--out", out, *flags)
    assert begun.returncode != 0
    assert metric(out, "step") == [1, 2, 2, 3], begun.stderr
    ended = run("train", cache, "--out", out, *FLAGS, "--save-every", 1, "--ema-decay", "0.9")
    assert ended.exit_code == 0, ended.output
    np.testing.assert_allclose(metric(out, "loss"), metric(whole, "loss"), rtol=RTOL)
    np.testing.assert_allclose(
        metric(out, "held_out/loss"), metric(whole, "held_out/loss"), rtol=RTOL
    )


@pytest.mark.slow
def test_two_processes_distil_labels_as_one_does(
    labelled: Path, tmp_path: Path, no_batch_norm: None
) -> None:
    """With --labels two processes give all losses of one process within 1e-4."""
    script = tmp_path / "plain.py"
    flags = (*FLAGS, "--labels", "parts", "--label-weight", 2)
    script.write_text(PLAIN)
    one = run("train", labelled, "--out", tmp_path / "one", *flags)
    assert one.exit_code == 0, one.output
    two = torchrun(script, 2, 99, "train", labelled, "--out", tmp_path / "two", *flags)
    assert two.returncode == 0, two.stderr
    for name in ("loss", "feature", "label", "held_out/loss", "held_out/label"):
        assert metric(tmp_path / "one", name)
        np.testing.assert_allclose(
            metric(tmp_path / "two", name), metric(tmp_path / "one", name), rtol=RTOL
        )
    ours, theirs = (load_file(tmp_path / p / "head" / "model.safetensors") for p in ("two", "one"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_two_students_as_each_alone(cache: Path, tmp_path: Path) -> None:
    """In two processes, students that share a loader have the losses that each has alone."""
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    names = ("test_convnext", "test_resnet")
    flags = ("train", cache, *FLAGS, "--log-with", "none", "--micro-batches", 2)
    both = torchrun(script, 2, 99, *flags, "--student", ",".join(names), "--out", tmp_path / "both")
    assert both.returncode == 0, both.stderr
    for name in names:
        alone = torchrun(script, 2, 99, *flags, "--student", name, "--out", tmp_path / name)
        assert alone.returncode == 0, alone.stderr
        for loss in ("loss", "held_out/loss"):
            assert metric(tmp_path / "both" / name, loss) == metric(tmp_path / name, loss) != []


@pytest.mark.slow
def test_a_process_that_is_refused_ends_all(cache: Path, tmp_path: Path) -> None:
    """A batch that the processes cannot share is refused in one line."""
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    refused = torchrun(
        script, 2, 99, "train", cache, "--out", tmp_path / "r", *FLAGS, "--batch-size", 9
    )
    assert refused.returncode != 0
    assert "--batch-size 9: expected a multiple of the 2 processes that share it" in refused.stderr


def test_the_average_is_evaluated_and_exported(
    cache: Path, tmp_path: Path, no_batch_norm: None
) -> None:
    """--ema-decay exports the EMA of the weights and logs its held-out losses too."""
    out = tmp_path / "ema"
    result = run("train", cache, "--out", out, *FLAGS, "--ema-decay", "0.5")
    assert result.exit_code == 0, result.output
    assert len(metric(out, "held_out_ema/loss")) == len(metric(out, "held_out/loss")) == 2
    assert metric(out, "held_out_ema/loss") != metric(out, "held_out/loss")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out"]["loss"] == metric(out, "held_out_ema/loss")[-1]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    exported = load_file(out / "backbone" / "model.safetensors")
    name = "stem.0.weight"
    assert torch.equal(exported[name], state["average"][f"module.backbone.model.{name}"])
    assert not torch.equal(exported[name], state["student"][f"backbone.model.{name}"])


def test_an_averaged_run_resumes_to_the_bit(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run interrupted at the third step resumes to an uninterrupted run's EMA."""
    from pipelines.train.trainer import Trainer

    flags = (*FLAGS, "--ema-decay", "0.9", "--save-every", "1", "--micro-batches", "2")
    assert run("train", cache, "--out", tmp_path / "a", *flags).exit_code == 0
    interrupt(monkeypatch, Trainer, "update", call=3)
    assert run("train", cache, "--out", tmp_path / "b", *flags).exit_code == 130
    assert run("train", cache, "--out", tmp_path / "b", *flags).exit_code == 0
    ends = [(tmp_path / name / "backbone" / "model.safetensors").read_bytes() for name in "ab"]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_compiled_student_takes_the_same_steps(cache: Path, whole: Path, tmp_path: Path) -> None:
    """--compile changes the losses only by rounding and no name in the export."""
    result = run("train", cache, "--out", tmp_path / "c", *FLAGS, "--compile")
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(metric(tmp_path / "c", "loss"), metric(whole, "loss"), rtol=1e-3)
    ours, theirs = (
        load_file(p / "backbone" / "model.safetensors") for p in (tmp_path / "c", whole)
    )
    assert ours.keys() == theirs.keys()


def test_views_and_weights_hang_on_no_part(
    cache: Path, tmp_path: Path, no_batch_norm: None
) -> None:
    """Crops, jitter and tap weights do not depend on --micro-batches."""
    flags = (
        *FLAGS,
        "--scale",
        "0.3,1.0",
        "--color-jitter",
        "0.5",
        "--noise-weighting",
        "--tap-weights",
        "stride4=2",
    )
    assert run("train", cache, "--out", tmp_path / "whole", *flags).exit_code == 0
    result = run(
        "train",
        cache,
        "--out",
        tmp_path / "parts",
        *flags,
        "--micro-batches",
        4,
        "--ema-decay",
        "0.5",
    )
    assert result.exit_code == 0, result.output
    for name in ("loss", "mse/t150/stride4", "at/t150/stride8", "held_out/loss"):
        np.testing.assert_allclose(
            metric(tmp_path / "parts", name), metric(tmp_path / "whole", name), rtol=RTOL
        )
    assert len(metric(tmp_path / "parts", "held_out_ema/loss")) == 2


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--scale", "0.3,1.0", "another --scale: expected None"),
        ("--regressor", "pafpn", "another --regressor: expected 'fpn-ppm'"),
    ],
)
def test_a_run_belongs_to_its_views_and_regressor(
    cache: Path, whole: Path, flag: str, value: str, named: str
) -> None:
    """A resume with other views or another regressor is refused with the field's name."""
    assert named in run("train", cache, "--out", whole, *FLAGS, flag, value).output
