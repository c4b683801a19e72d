"""Misuses of the command line: each is one line with exit code 2, and nothing is begun."""

import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import main
from pipelines.terminal.hints import commands_of

MISUSES = (
    # A misuse, and what its line names. {O} is a path that must stay free.
    ("nosuch", "nosuch"),
    ("doctor {LONG}", "{START}"),
    ("doctor {MISSING}", "{MISSING}"),
    ("doctor {FILE}", "{FILE}"),
    ("doctor ''", "FOLDER"),
    ("completion powershell", "powershell"),
    ("completion bash zsh", "zsh"),
    ("completion --shell bash", "--shell"),
    ("scenes --count five --out {O}", "--count"),
    ("scenes --count 0 --out {O}", "--count"),
    ("scenes --count 10000000000000 --out {O}", "--count"),
    ("scenes --count 5 --size 8 --out {O}", "--size"),
    ("scenes --count 5 --seed -1 --out {O}", "--seed"),
    ("scenes --count 5", "--out"),
    ("scenes --count 5 --out ''", "--out"),
    ("scenes --count 5 --out {FILE}", "--out"),
    ("scenes --count 5 --out {CACHE}", "{CACHE}"),
    ("scenes --num 5 --out {O}", "--num"),
    ("demo --out {FILE}", "--out"),
    ("demo --out ''", "--out"),
    ("demo --epochs 0 --out {O}", "--epochs"),
    ("demo --train-images 1000001 --out {O}", "--train-images"),
    ("demo --train-images 40 --out {O}", "--train-images"),
    ("demo --test-images 1000000000000 --out {O}", "--test-images"),
    ("demo --config {MISSING} --out {O}", "--config"),
    ("teacher nosuch", "nosuch"),
    ("teacher train {MISSING} --out {O}", "{MISSING}"),
    ("teacher train {CACHE} --out {O}", "{CACHE}"),
    ("teacher train {IMAGES} --size big --out {O}", "--size"),
    ("teacher train {IMAGES} --ema-decay 1 --out {O}", "--ema-decay"),
    ("teacher train {IMAGES} --channels 8,x --out {O}", "--channels"),
    ("teacher train {IMAGES} --keep-steps 5,x --out {O}", "--keep-steps"),
    ("teacher train {IMAGES} --split train --out {O}", "--split"),
    ("teacher train {IMAGES} --keys rows --out {O}", "--keys"),
    ("teacher train {TAR} --label-column x --out {O}", "--label-column"),
    ("teacher train {TAR} --follow-links --out {O}", "--follow-links"),
    ("teacher train {FILE} --out {O}", "{FILE}"),
    ("teacher show ''", "DIR_OR_ID"),
    ("teacher show {MISSING}", "{MISSING}"),
    ("teacher show {CACHE}", "{CACHE}"),
    ("teacher show {TEACHER} --size big", "--size"),
    ("teacher show {TEACHER} --plot {O}", "--plot"),
    ("teacher convert {MISSING} --out {O}", "{MISSING}"),
    ("teacher convert {TEACHER} --out {O}", "{TEACHER}"),
    ("teacher convert {FILE} --out {IMAGES}", "--out"),
    ("extract {MISSING} --teacher {TEACHER} --out {O}", "{MISSING}"),
    ("extract {CACHE} --teacher {TEACHER} --out {O}", "{CACHE}"),
    ("extract {FILE} --teacher {TEACHER} --out {O}", "{FILE}"),
    ("extract {TAR} --teacher {TEACHER} --follow-links --out {O}", "--follow-links"),
    ("extract {IMAGES} --out {O}", "--teacher"),
    ("extract {IMAGES} --teacher {LONG} --out {O}", "{START}"),
    ("extract {IMAGES} --teacher {TEACHER} --out {LONG}", "{START}"),
    ("extract {IMAGES} --teacher '' --out {O}", "--teacher"),
    ("extract {IMAGES} --teacher {MISSING} --out {O}", "{MISSING}"),
    ("extract {IMAGES} --teacher {IMAGES} --out {O}", "{IMAGES}"),
    ("extract {IMAGES} --teacher {TEACHER} --out {IMAGES}", "{IMAGES}"),
    ("extract {IMAGES} --teacher {TEACHER} --taps '' --out {O}", "--taps"),
    ("extract {IMAGES} --teacher {TEACHER} --taps nosuch --out {O}", "--taps"),
    ("extract {IMAGES} --teacher {TEACHER} --size big --out {O}", "--size"),
    ("extract {IMAGES} --teacher {TEACHER} --timestep 1000 --out {O}", "--timestep"),
    ("extract {IMAGES} --teacher {TEACHER} --condition x --out {O}", "--condition"),
    ("extract {IMAGES} --teacher {TEACHER} --prompt cat --out {O}", "--prompt"),
    ("extract {IMAGES} --teacher {TEACHER} --average --out {O}", "--average"),
    ("extract {IMAGES} --teacher {TEACHER} --fit crop --out {O}", "--fit"),
    ("extract {IMAGES} --teacher {TEACHER} --max-failures 5% --out {O}", "--max-failures"),
    ("extract {IMAGES} --teacher {TEACHER} --threads 1000000000 --out {O}", "--threads"),
    ("extract {IMAGES} --teacher {TEACHER} --workers 1000000000 --out {O}", "--workers"),
    ("extract {IMAGES} --teacher {TEACHER} --timestep -99999999999999999999 --out {O}", "--time"),
    ("extract {IMAGES} --teacher {TEACHER} --config {FILE} --out {O}", "--config"),
    ("extract {IMAGES} --teacher {TEACHER} --workers 2 --scheduler x --out {O}", "--workers"),
    ("inspect", "CACHE_OR_RUN"),
    ("inspect {LONG}", "{START}"),
    ("inspect {MISSING}", "{MISSING}"),
    ("inspect {IMAGES}", "{IMAGES}"),
    ("inspect {CACHE} --num-samples 5 --exact", "--num-samples"),
    ("inspect {CACHE} --report {MISSING}/x.html", "--report"),
    ("inspect {CACHE} --report {IMAGES}", "--report"),
    ("inspect {CACHE} --cache {CACHE}", "--cache"),
    ("verify {MISSING}", "{MISSING}"),
    ("verify {LONG}", "{START}"),
    ("verify {CACHE} --fraction 5", "--fraction"),
    ("verify {CACHE} --dry-run", "--dry-run"),
    ("verify {CACHE} --repair", "--repair"),
    ("verify {CACHE} --yes", "--yes"),
    ("label fit {CACHE} --masks {LONG} --out {O}", "{START}"),
    ("label nosuch", "nosuch"),
    ("label fit {IMAGES} --masks {IMAGES} --out {O}", "{IMAGES}"),
    ("label fit {CACHE} --out {O}", "--masks"),
    ("label fit {CACHE} --masks {MISSING} --out {O}", "{MISSING}"),
    ("label fit {CACHE} --masks {IMAGES} --warmup-epochs 200 --out {O}", "--warmup-epochs"),
    # Options that no masks could make right are refused before the masks are read.
    ("label fit {CACHE} --masks {MISSING} --width 40 --out {O}", "--width"),
    ("label fit {CACHE} --masks {MISSING} --width 40000000 --out {O}", "--width"),
    ("label fit {CACHE} --masks {MISSING} --validation 1 --out {O}", "--validation"),
    ("label fit {CACHE} --masks {MISSING} --ignore-index 1000 --out {O}", "--ignore-index"),
    ("label write {CACHE} {MISSING} --name x", "{MISSING}"),
    ("label write {CACHE} {CACHE} --name x", "{CACHE}"),
    ("label write {CACHE} {CACHE} --name ''", "--name"),
    ("train {MISSING} --out {O}", "{MISSING}"),
    ("train {IMAGES} --out {O}", "{IMAGES}"),
    ("train {LONG} --out {O}", "{START}"),
    ("train {CACHE} --batch-size 2 --out {LONG}", "{START}"),
    ("train {CACHE} --out ''", "--out"),
    ("train {CACHE} --out {FILE}", "--out"),
    ("train {CACHE} --batch-size 4 --epochs 2 --student nosuch --out {O}", "nosuch"),
    ("train {CACHE} --batch-size 4 --epochs 2 --taps 64 --out {O}", "--taps"),
    ("train {CACHE} --loss nosuch --out {O}", "--loss"),
    ("train {CACHE} --labels nosuch --out {O}", "nosuch"),
    ("train {CACHE} --scale 2,3 --out {O}", "--scale"),
    ("train {CACHE} --epochs 5 --warmup-epochs 9 --out {O}", "--warmup-epochs"),
    ("train {CACHE} --batch-size 100000 --out {O}", "--batch-size"),
    ("train {CACHE} --batch-size 99999999999999999999 --out {O}", "--batch-size"),
    ("train {CACHE} --epochs 99999999999999999999 --out {O}", "--epochs"),
    ("train {CACHE} --fpn-width 100000 --out {O}", "--fpn-width"),
    ("train {CACHE} --num-workers 100000 --out {O}", "--num-workers"),
    ("train {CACHE} --timestep 99999999999999999999 --out {O}", "--timestep"),
    ("train {CACHE} --resume --out {O}", "--resume"),
    ("train {IMAGES} --teacher {TEACHER} --out {O}", "--timestep"),
    ("train {CACHE} --size 32 --out {O}", "--size"),
    ("train {CACHE} --device gpu --out {O}", "--device"),
    ("export {LONG} --to timm --out {O}", "{START}"),
    ("export {MISSING} --to timm --out {O}", "{MISSING}"),
    ("export {CACHE} --to timm --out {O}", "{CACHE}"),
    ("export {CACHE} --to keras --out {O}", "--to"),
    ("export {CACHE} --to timm --out {FILE}", "--out"),
    ("evaluate resnet10t --train {LONG}", "{START}"),
    ("evaluate ''", "MODEL"),
    ("evaluate resnet10t", "--train"),
    ("evaluate nosuch --train {IMAGES}", "nosuch"),
    ("evaluate {IMAGES} --train {IMAGES}", "{IMAGES}"),
    ("evaluate resnet10t --train {MISSING}", "{MISSING}"),
    ("evaluate resnet10t --train {IMAGES} --ignore-index 3", "--ignore-index"),
    ("evaluate resnet10t --train {IMAGES} --test-split x", "--test-split"),
    ("sweep {MISSING} --out {O}", "{MISSING}"),
    ("sweep {LONG} --out {O}", "{START}"),
    ("sweep {IMAGES} --out {O}", "{IMAGES}"),
    ("sweep {FILE} --out {O}", "{FILE}"),
    ("sweep {SWEEP} --out {O}", "{SWEEP}"),
    ("sweep {SWEEP} --jobs 0 --out {O}", "--jobs"),
)


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory,
    scene_folder: Path,
    teacher_dir: Path,
    tiny_cache: Path,
) -> dict[str, Path]:
    """Inputs of every kind by name, each of which is right somewhere."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "notes.txt").write_text("no options")
    (root / "sweep.toml").write_text("[[arm]]\nname = 'a'\n[arm.train]\nnosuch = 1\n")
    with tarfile.open(root / "images.tar", "w") as tar:
        tar.add(next(scene_folder.rglob("*.png")), "a.png")
    return {
        "IMAGES": scene_folder,
        "TEACHER": teacher_dir,
        "CACHE": Path(shutil.copytree(tiny_cache, root / "cache")),
        "TAR": root / "images.tar",
        "FILE": root / "notes.txt",
        "SWEEP": root / "sweep.toml",
        "MISSING": root / "missing",
        "LONG": Path("\u00e9" * 300),
        "START": Path("\u00e9" * 30),
        "O": root / "out",
    }


def listing(folder: Path) -> dict[str, int]:
    """Return every path under a folder with the time of its last change."""
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("command", "named"), MISUSES, ids=[command for command, _ in MISUSES])
def test_a_misuse_is_one_line_and_exit_code_2(
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    named: str,
) -> None:
    """The line names the flag or the file, and no file is written, changed or removed."""
    monkeypatch.chdir(tmp_path)
    folders = (inputs["O"].parent, inputs["IMAGES"], inputs["TEACHER"], tmp_path)
    before = [listing(folder) for folder in folders]
    words = [word.format(**inputs) for word in shlex.split(command)]
    result = CliRunner().invoke(main, words)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2, result.output
    assert len(errors) == 1, result.output
    assert named.format(**inputs) in errors[0]
    assert result.stderr.splitlines()[-1] == errors[0]
    assert result.stdout == ""
    assert [listing(folder) for folder in folders] == before


def test_the_misuses_are_of_all_verbs() -> None:
    """There are more than 50 misuses, and several of every verb."""
    assert len({command for command, _ in MISUSES}) == len(MISUSES) == 138
    for verb in commands_of(main):
        assert sum(command.startswith(f"{verb} ") for command, _ in MISUSES) >= 3, verb
