"""Several students of one loader: each has the losses that it has alone, and a run of its own."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from support.cli import run, words
from support.interrupts import interrupt

from dtcache.cache.joined_cache import JoinedCache
from dtcache.errors import CacheMismatchError, ConfigError
from dtcache.options import TrainOptions
from dtcache.options.train import PER_STUDENT
from dtcache.teacher.teacher import Teacher
from pipelines.train.distillation import DecodedBatch
from pipelines.train.shared_loader import require_one_loader, runs_of
from pipelines.train.train import StudentsError, train, train_shared
from pipelines.train.trainer import Trainer

OPTIONS = TrainOptions(
    student="test_resnet",
    epochs=2,
    batch_size=8,
    warmup_epochs=0,
    fpn_width=16,
    loss="mse",
    precision="fp32",
    device="cpu",
    num_workers=1,
    log_every=1,
    save_every=1,
    student_size="32",
    log_with="none",
)
FLAGS = words(
    "--epochs 2 --batch-size 8 --warmup-epochs 0 --fpn-width 16 --loss mse --precision fp32 "
    "--device cpu --num-workers 1 --log-every 1 --save-every 1 --student-size 32 --log-with none"
)
DIFFERENT = {
    "a": {"scale": "0.3,1.0", "color_jitter": 0.5, "tap_weights": "stride4=2"},
    "b": {
        "student": "test_efficientnet",
        "student_size": "64",
        "regressor": "pafpn",
        "fpn_width": 8,
        "loss": "at",
        "optimizer": "lamb",
        "lr": 1e-3,
        "ema_decay": 0.5,
        "clip_grad": 1.0,
    },
}
"""Options of two students that share a loader, by folder."""
pytestmark = pytest.mark.usefixtures("no_fsync")


def runs(out: Path, **common: object) -> list[tuple[Path, TrainOptions]]:
    """Return the runs of the two different students."""
    return [
        (out / name, replace(OPTIONS, **{**common, **differing}))
        for name, differing in DIFFERENT.items()
    ]


def metrics(folder: Path) -> list[dict]:
    """Return a run's metrics, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second", "wait_share")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def contents(folder: Path) -> list[object]:
    """Return what a run folder holds, except for times."""
    names = ("init/model.safetensors", "backbone/model.safetensors", "run.json", "config.toml")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    weights = {name: value.numpy().tobytes() for name, value in state["student"].items()}
    return [metrics(folder), weights, *((folder / name).read_bytes() for name in names)]


@pytest.fixture(scope="module")
def shared(scene_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two different students, trained from one loader."""
    out = tmp_path_factory.mktemp("shared")
    first, second = train_shared([scene_cache], runs(out))
    assert (first.out, second.out) == (out / "a", out / "b")
    assert first.steps == second.steps == len([m for m in metrics(out / "a") if "loss" in m]) > 2
    return out


def test_each_student_has_the_run_that_it_has_alone(
    scene_cache: Path, shared: Path, tmp_path: Path
) -> None:
    """Losses, weights, EMA and identity equal to the bit those of a run of one student."""
    for folder, options in runs(tmp_path):
        train([scene_cache], folder, options)
        assert contents(folder) == contents(shared / folder.name)


def test_micro_batches_in_bf16_are_shared_to_the_bit(scene_cache: Path, tmp_path: Path) -> None:
    """In bf16 with two micro-batches per batch a student's losses are those that it has alone."""
    common = {"precision": "bf16", "micro_batches": 2, "epochs": 1}
    train_shared([scene_cache], runs(tmp_path / "shared", **common))
    folder, options = runs(tmp_path / "alone", **common)[1]
    train([scene_cache], folder, options)
    assert contents(folder) == contents(tmp_path / "shared" / "b")


def test_soft_labels_are_shared_to_the_bit(labelled: Path, tmp_path: Path) -> None:
    """With soft labels, cropped for one student only, each student has its own losses."""
    common = {"labels": "parts", "epochs": 1}
    train_shared([labelled], runs(tmp_path / "shared", **common))
    for folder, options in runs(tmp_path, **common):
        train([labelled], folder, options)
        assert contents(folder) == contents(tmp_path / "shared" / folder.name)
        assert all("label" in line for line in metrics(folder) if "loss" in line)


def test_a_batch_is_decoded_once_for_all(
    scene_cache: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two students read and decode as many batches as one, held-out batches included."""
    read, decoded = (
        interrupt(monkeypatch, JoinedCache, "batch", call=0),
        interrupt(monkeypatch, DecodedBatch, "__init__", call=0),
    )
    counts = []
    for chosen in (runs(tmp_path / "one", epochs=1)[:1], runs(tmp_path / "two", epochs=1)):
        before = (len(read), len(decoded))
        train_shared([scene_cache], chosen)
        counts.append((len(read) - before[0], len(decoded) - before[1]))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_checkpoints_at_different_steps_resume_to_the_bit(
    scene_cache: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is ahead waits for the other run, and both end as if never interrupted."""
    calls = interrupt(monkeypatch, Trainer, "update", call=2)
    with pytest.raises(KeyboardInterrupt):
        train_shared([scene_cache], runs(tmp_path))
    assert (tmp_path / "a" / "checkpoint.pt").exists()
    assert not (tmp_path / "b" / "checkpoint.pt").exists()
    first, second = train_shared([scene_cache], runs(tmp_path))
    assert len(calls) == 2 + (first.steps - 1) + second.steps
    for name in DIFFERENT:
        assert contents(tmp_path / name) == contents(shared / name)


def test_a_student_that_fails_ends_alone(
    scene_cache: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is not finite ends that student; the others end as usual, then it is raised."""
    (one, options), two = runs(tmp_path)
    with pytest.raises(
        StudentsError,
        match=r"1 of 2 students failed, the others are trained: a: the loss is not finite at step "
        r"[1-3] .*`lr`",
    ) as raised:
        train_shared([scene_cache], [(one, replace(options, lr=1e30)), two])
    lines = capsys.readouterr().err.splitlines()
    assert [line[:18] for line in lines if " steps of " in line] == [
        "a: 4 steps of 8 im",
        "b: 4 steps of 8 im",
    ]
    assert list(raised.value.failures) == [one]
    assert not (one / "backbone").exists()
    assert contents(tmp_path / "b") == contents(shared / "b")


def test_students_of_one_command_have_runs_of_their_own(scene_cache: Path, tmp_path: Path) -> None:
    """`--student a,b` makes OUT/a and OUT/b, which later commands read, skip and resume."""
    names = ["test_resnet", "test_efficientnet"]
    command = ("train", scene_cache, *FLAGS)
    both = run(*command, "--student", ",".join(names), "--out", tmp_path)
    assert both.exit_code == 0, both.output
    before = [contents(tmp_path / name) for name in names]
    for name in names:
        assert f"{tmp_path / name / 'backbone'}: 4 steps, held-out loss" in both.output
        alone = run(*command, "--student", name, "--out", tmp_path / name)
        assert alone.exit_code == 0, alone.output
    again = run(*command, "--student", ",".join(reversed(names)), "--out", tmp_path)
    assert again.exit_code == 0, again.output
    assert [contents(tmp_path / name) for name in names] == before
    listed = run("inspect", *(tmp_path / name for name in names), "--json")
    assert listed.exit_code == 0, listed.output
    refused = run(*command, "--student", ",".join(names), "--out", tmp_path / names[0])
    assert refused.exit_code == 2
    assert "holds the run of one student, got 2 students; pass a new --out" in refused.output


def test_no_folder_is_begun_if_one_is_refused(
    scene_cache: Path, shared: Path, tmp_path: Path
) -> None:
    """If one folder holds another run, the other folders are not created."""
    (new, first), (_, second) = runs(tmp_path)
    with pytest.raises(CacheMismatchError, match="holds a run with another `lr`"):
        train_shared([scene_cache], [(new, first), (shared / "b", replace(second, lr=1e-2))])
    assert not new.exists()


def test_a_teacher_in_the_loop_runs_once_for_all(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two students of an online teacher share its passes and have their own losses to the bit."""
    online = {"teacher": str(teacher_dir), "timestep": 150, "taps": "4,8", "epochs": 1}
    passes = interrupt(monkeypatch, Teacher, "features", call=0)
    (folder, options), _ = runs(tmp_path / "alone", **online)
    train([scene_folder], folder, options)
    alone = len(passes)
    train_shared([scene_folder], runs(tmp_path / "shared", **online))
    assert len(passes) == 2 * alone > 0
    assert contents(folder) == contents(tmp_path / "shared" / "a")


def test_options_that_may_differ_are_options() -> None:
    """PER_STUDENT lists fields of TrainOptions, each once, and none that decides the batches."""
    names = [f.name for f in fields(TrainOptions)]
    assert set(PER_STUDENT) < set(names)
    assert len(set(PER_STUDENT)) == len(PER_STUDENT)
    assert {"seed", "epochs", "batch_size", "taps", "labels", "teacher"}.isdisjoint(PER_STUDENT)


@pytest.mark.parametrize(
    ("differing", "message"),
    [
        ({"seed": 1}, "`seed`: expected one value for all students of a loader, got 0 for a and 1"),
        (
            {"epochs": 3},
            "`epochs`: expected one value .* got 2 for a and 3 for b; train them apart",
        ),
        ({"num_workers": 2}, "`num_workers`: expected one value"),
        ({"labels": "x"}, "`labels`: expected one value for all students of a loader, got None"),
        ({"log_with": "wandb"}, "`log_with` wandb: expected tensorboard or none for several"),
    ],
)
def test_runs_with_other_batches_are_refused(
    tmp_path: Path, differing: dict[str, object], message: str
) -> None:
    """Students that cannot share their batches are refused with the field's name."""
    with pytest.raises(ConfigError, match=message):
        train_shared(
            [tmp_path / "none"],
            [(tmp_path / "a", OPTIONS), (tmp_path / "b", replace(OPTIONS, **differing))],
        )
    assert not list(tmp_path.iterdir())


def test_runs_with_and_without_features_are_refused(tmp_path: Path) -> None:
    """A student of labels alone has batches without features, and shares no loader of features."""
    mixed = replace(OPTIONS, labels="x")
    require_one_loader([(tmp_path / "a", mixed), (tmp_path / "b", replace(mixed, label_weight=2))])
    with pytest.raises(
        ConfigError, match=r"`feature_weight`: expected one value .* None for a and"
    ):
        require_one_loader(
            [(tmp_path / "a", mixed), (tmp_path / "b", replace(mixed, feature_weight=0))]
        )


def test_more_students_than_torch_compiles_are_refused(tmp_path: Path) -> None:
    """With `compile` a loader has at most as many students as torch compiles at once."""
    compiled = replace(OPTIONS, compile=True)
    require_one_loader([(tmp_path / str(number), compiled) for number in range(8)])
    require_one_loader([(tmp_path / str(number), OPTIONS) for number in range(9)])
    with pytest.raises(
        ConfigError, match="`compile`: expected at most 8 students on a loader, got"
    ):
        require_one_loader([(tmp_path / str(number), compiled) for number in range(9)])


def test_runs_without_folders_of_their_own_are_refused(tmp_path: Path) -> None:
    """No runs, and two runs in one folder, are refused."""
    with pytest.raises(ConfigError, match="`runs`: expected at least one folder"):
        require_one_loader([])
    with pytest.raises(ConfigError, match=r"`runs`: .*b is the folder of two runs; pass one for"):
        require_one_loader([(tmp_path / "b", OPTIONS), (tmp_path / "a" / ".." / "b", OPTIONS)])


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("resnet18,resnet18", "resnet18 comes twice; pass it once"),
        ("resnet18, resnet18", "resnet18 comes twice; pass it once"),
        ("resnet18,", "expected names that can be names of folders, got ''; train that student"),
        ("resnet18,hf-hub:timm/x", "got 'hf-hub:timm/x'; train that student alone"),
        ("resnet18,..", "got '..'; train that student alone"),
    ],
)
def test_names_that_cannot_be_folders_are_refused(
    tmp_path: Path, student: str, message: str
) -> None:
    """A student named twice, or by a name that is no folder's, is refused."""
    with pytest.raises(ConfigError) as raised:
        runs_of(tmp_path, replace(OPTIONS, student=student))
    assert message in str(raised.value)
    assert runs_of(tmp_path, replace(OPTIONS, student="hf-hub:timm/x"))[0][0] == tmp_path
