"""`dtcache train --extend`: a finished run is trained for more epochs, in a folder of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli import run, words
from support.extraction import quick_extraction
from support.interrupts import interrupt

import dtcache.optim
from pipelines.extract.extract import extract
from pipelines.train.trainer import Trainer

FLAGS = words(
    "--student test_resnet --batch-size 8 --regressor fpn --fpn-width 8 --precision fp32 "
    "--device cpu --log-every 1 --save-every 2 --student-size 32 --log-with none --epochs 1 "
    "--scale 0.3,1.0 --ema-decay 0.9"
)


def steps_of(folder: Path) -> list[dict]:
    """Return the metrics of every step, without step numbers and times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left_out = ("step", "epoch", "seconds", "images_per_second", "wait_share")
    return [{k: v for k, v in line.items() if k not in left_out} for line in lines]


def said(result: object) -> str:
    """Return a command's output on one line."""
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def finished(scene_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, finished."""
    out = tmp_path_factory.mktemp("extend") / "first"
    result = run("train", scene_cache, "--out", out, *FLAGS)
    assert result.exit_code == 0, result.output
    return out


def test_an_extension_continues_all_but_the_schedule(
    scene_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a constant rate, 1 epoch and 2 extensions by 1 equal a run of 3 epochs, to the bit.

    Weights, moments, EMA, order, views and crops continue; only the schedule starts again.
    """
    monkeypatch.setattr(dtcache.optim, "warmup_cosine", lambda step, warmup, total: 1.0)
    for name, flags in {
        "whole": ("--epochs", 3),
        "a": (),
        "b": ("--extend", tmp_path / "a"),
        "c": ("--extend", tmp_path / "b"),
    }.items():
        result = run("train", scene_cache, "--out", tmp_path / name, *FLAGS, *flags)
        assert result.exit_code == 0, result.output
    assert "extends" in said(result) and "trained for 2 epochs (4 steps)" in said(result)
    parts = [line for name in "abc" for line in steps_of(tmp_path / name)]
    assert parts == steps_of(tmp_path / "whole")
    state, whole = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("c", "whole")
    )
    for name in ("student", "average"):
        for key, value in whole[name].items():
            assert torch.equal(state[name][key], value), key


def test_an_extension_has_a_warm_up_and_a_cosine_of_its_own(
    scene_cache: Path, finished: Path, tmp_path: Path
) -> None:
    """The rate of 2 further epochs rises in a tenth of them, here half a step, and falls to 0.

    The finished run stays as it is, and `init` has the backbone that it ended with.
    """
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    out = tmp_path / "more"
    flags = (*FLAGS, "--extend", finished, "--epochs", 2, "--warmup-epochs", 1)
    assert run("train", scene_cache, "--out", out, *flags).exit_code == 0
    rates = [line["lr"] for line in steps_of(out) if "lr" in line]
    peak = 4e-3 * 8 / 256
    assert rates == pytest.approx([peak / 2, peak, peak, peak / 2])
    assert before == {p: p.read_bytes() for p in before}
    start = load_file(out / "init" / "model.safetensors")
    ended = torch.load(finished / "checkpoint.pt", weights_only=True)["student"]
    assert all(torch.equal(value, ended[f"backbone.model.{name}"]) for name, value in start.items())


def test_what_is_extended_is_recorded_and_inspected(
    scene_cache: Path, finished: Path, tmp_path: Path
) -> None:
    """run.json has path, fingerprint, epochs and steps of the finished run; inspect shows them.

    The run's config.toml repeats the extension.
    """
    from dtcache.hashing import file_sha256

    out = tmp_path / "more"
    assert run("train", scene_cache, "--out", out, *FLAGS, "--extend", finished).exit_code == 0
    options = json.loads(run("inspect", out, "--json").stdout)["options"]
    assert options["extend"] == str(finished)
    assert options["extended_run"] == file_sha256(finished / "run.json")
    assert (options["extended_epochs"], options["extended_steps"]) == (1, 2)
    assert options["extended_run"][:16] in run("inspect", out).output
    again = run("train", scene_cache, "--out", tmp_path / "n", "--config", out / "config.toml")
    assert again.exit_code == 0, again.output
    assert steps_of(tmp_path / "n") == steps_of(out)


def test_an_interrupted_extension_resumes_to_the_bit(
    scene_cache: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before and after its first checkpoint, an extension resumes to the same losses."""
    flags = (*FLAGS, "--extend", finished, "--epochs", 2)
    assert run("train", scene_cache, "--out", tmp_path / "whole", *flags).exit_code == 0
    for call in (2, 4):
        with monkeypatch.context() as patch:
            interrupt(patch, Trainer, "update", call=call)
            assert run("train", scene_cache, "--out", tmp_path / "r", *flags).exit_code == 130
    plain = run("train", scene_cache, "--out", tmp_path / "r", *FLAGS, "--epochs", 2)
    assert "holds a run with another --extend" in said(plain)
    assert run("train", scene_cache, "--out", tmp_path / "r", *flags).exit_code == 0
    assert steps_of(tmp_path / "r") == steps_of(tmp_path / "whole")


def test_more_epochs_for_a_finished_run_name_the_option(scene_cache: Path, finished: Path) -> None:
    """A finished run's own command with more epochs is refused, and the line names --extend."""
    refused = run("train", scene_cache, "--out", finished, *FLAGS, "--epochs", 4)
    assert refused.exit_code == 2
    assert (
        f"holds a finished run of 1 --epochs, got 4; to train it further, pass --extend {finished}"
        in said(refused)
    )
    other = run("train", scene_cache, "--out", finished, *FLAGS, "--epochs", 4, "--seed", 1)
    assert "holds a run with another --seed: expected 0, got 1" in said(other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--student", "resnet10t"), "expected its --student, 'test_resnet', got 'resnet10t';"),
        (("--regressor", "pafpn"), "expected its --regressor, 'fpn', got 'pafpn'"),
        (("--fpn-width", "16"), "expected its --fpn-width, 8, got 16"),
        (("--student-size", "64"), "expected its --student-size, '32', got '64'"),
        (("--optimizer", "lamb"), "expected its --optimizer, 'adamw', got 'lamb'"),
        (("--weight-decay", "0.1"), "expected its --weight-decay, 0.05, got 0.1"),
        (("--taps", "4"), "expected its targets, t150/stride4, t150/stride8, got t150/stride4;"),
    ],
)
def test_options_that_do_not_agree_are_refused_by_name(
    scene_cache: Path, finished: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    """Another student, other taps or another optimizer end in one line, and nothing is begun."""
    out = tmp_path / "r"
    refused = run("train", scene_cache, "--out", out, *FLAGS, "--extend", finished, *flags)
    assert refused.exit_code == 2
    assert message in said(refused)
    assert "Traceback" not in said(refused)
    assert not out.exists()


def test_the_ema_is_there_in_both_runs_or_in_none(
    scene_cache: Path, finished: Path, tmp_path: Path
) -> None:
    """A run with an EMA is not extended without one; the decay itself may change."""
    without = [flag for flag in FLAGS if flag not in ("--ema-decay", "0.9")]
    command = ("train", scene_cache, "--out", tmp_path / "r")
    refused = run(*command, *without, "--extend", finished)
    assert "expected its --ema-decay, 0.9, got None" in said(refused)
    assert not (tmp_path / "r").exists()
    changed = run(*command, *FLAGS, "--extend", finished, "--ema-decay", 0.5, "--lr", 1e-4)
    assert changed.exit_code == 0, changed.output


def test_folders_that_cannot_be_extended_are_one_line(
    scene_cache: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run, an unfinished run, another verb's run, a run online, and the same folder."""
    (tmp_path / "none").mkdir()
    for name in ("unfinished", "teacher", "online", "damaged", "older", "moments"):
        shutil.copytree(finished, tmp_path / name)
    (tmp_path / "unfinished" / "summary.json").unlink()
    (tmp_path / "teacher" / "run.json").write_text('{"steps": 4}')
    recorded = json.loads((finished / "run.json").read_text())
    (tmp_path / "online" / "run.json").write_text(json.dumps({**recorded, "teacher": "ddpm"}))
    (tmp_path / "damaged" / "run.json").write_text("{")
    (tmp_path / "moments" / "checkpoint.pt").unlink()
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    torch.save({**state, "step": 1}, tmp_path / "older" / "checkpoint.pt")
    messages = {
        "absent": "expected the folder of a run of dtcache train, which has run.json",
        "none": "expected the folder of a run of dtcache train, which has run.json",
        "unfinished": "expected a finished run, got one that has steps left",
        "teacher": "expected a run of dtcache train, got another run",
        "online": "expected a run that was trained on a cache, got one with a teacher in the loop",
        "damaged": "not readable as JSON",
        "older": "expected the checkpoint of its last step, 2, with the moments of the optimizer",
        "moments": "moments of the optimizer, got none; start from its backbone with --init",
    }
    for name, message in messages.items():
        command = ("train", scene_cache, "--out", tmp_path / "r", *FLAGS)
        refused = run(*command, "--extend", tmp_path / name)
        assert refused.exit_code == (1 if name == "damaged" else 2)
        assert message in said(refused), name
        assert said(refused).startswith(f"Error: --extend {tmp_path / name}"), name
        assert not (tmp_path / "r").exists()
    same = run("train", scene_cache, "--out", finished, *FLAGS, "--extend", finished)
    assert "expected another folder than --out, as the finished run stays as it is" in said(same)
    online = run(
        "train",
        scene_cache,
        "--out",
        tmp_path / "r",
        "--extend",
        finished,
        "--teacher",
        "ddpm",
        "--timestep",
        "5",
    )
    assert "--extend: only a cache uses this option" in said(online)


def test_the_cache_may_be_another_one_of_the_same_taps(
    scene_folder: Path, teacher_dir: Path, finished: Path, tmp_path: Path
) -> None:
    """A cache of fewer images at other bytes extends the run; one of other maps does not."""
    options = quick_extraction(teacher_dir, limit=24, quality="fp16")
    extract(scene_folder, tmp_path / "other", options)
    out = tmp_path / "r"
    command = ("--out", out, *FLAGS, "--extend", finished)
    result = run("train", tmp_path / "other", *command)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "run.json").read_text())["extended_steps"] == 2
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    cases = (
        ("teacher", "0" * 64, "expected a cache of the same teacher, got one of other weights"),
        ("classes", ["a"], "expected --labels of the same classes in the same order"),
        (
            "targets",
            {**state["source"]["targets"], "t150/stride8": [32, 2, 2]},
            "expected maps of t150/stride8 with (channels, height, width) [32, 2, 2], got [",
        ),
        ("targets", None, "its checkpoint does not record the targets that it was trained on"),
    )
    for number, (field, value, message) in enumerate(cases):
        changed = Path(shutil.copytree(finished, tmp_path / str(number)))
        source = {**state["source"], field: value}
        torch.save({**state, "source": source}, changed / "checkpoint.pt")
        refused = run(
            "train", tmp_path / "other", "--out", tmp_path / "n", *FLAGS, "--extend", changed
        )
        assert message in said(refused)
        assert not (tmp_path / "n").exists()


def test_several_students_extend_the_runs_of_their_names(scene_cache: Path, tmp_path: Path) -> None:
    """OUT/NAME extends RUN/NAME; runs of different lengths cannot share a loader."""
    flags = (*FLAGS, "--student", "test_vit,test_resnet")
    assert run("train", scene_cache, "--out", tmp_path / "a", *flags).exit_code == 0
    command = ("train", scene_cache, "--out", tmp_path / "b", *flags, "--extend", tmp_path / "a")
    result = run(*command)
    assert result.exit_code == 0, result.output
    for name in ("test_vit", "test_resnet"):
        recorded = json.loads((tmp_path / "b" / name / "run.json").read_text())
        assert recorded["extend"] == str(tmp_path / "a" / name)
    shutil.rmtree(tmp_path / "a" / "test_vit")
    shutil.copytree(tmp_path / "b" / "test_vit", tmp_path / "a" / "test_vit")
    refused = run("train", scene_cache, "--out", tmp_path / "c", *flags, "--extend", tmp_path / "a")
    assert "expected runs of equally many epochs for all students of a loader, got 2 for" in said(
        refused
    )
    assert not (tmp_path / "c").exists()
