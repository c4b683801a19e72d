"""Sweep files: what they mean, and one line for everything that is wrong with one."""

import copy
import tomllib
from pathlib import Path
from random import Random

import pytest
from support.cli import run
from support.fuzz.files import mutate_bytes
from support.fuzz.json_values import mutate_json
from support.fuzz.toml_values import toml_bytes

from dtcache.errors import ConfigError
from pipelines.sweep.sweep_file import read_sweep

GOOD = """
seeds = [3, 4]
baseline = "plain"
[train]
student = "resnet10t"
student_size = 64
epochs = 30
[[cache]]
name = "t20"
path = "t20.cache"
[[cache]]
name = "untrained"
per_seed = true
[cache.extract]
images = "photos"
teacher = "teachers/untrained"
timestep = 20
[[arm]]
name = "plain"
cache = "t20"
[[arm]]
name = "at"
cache = "untrained"
[arm.train]
loss = "at"
[[arm]]
name = "random"
start = "random"
[evaluate.probe]
train = "photos"
[evaluate.scenes]
task = "segmentation"
train = "photos"
train_masks = "masks"
finetune = true
seeds = [0, 1]
[evaluate.boxes]
task = "detection"
masks = true
train = "photos"
train_boxes = "boxes.json"
[evaluate.few]
train = "photos"
finetune = true
label_fraction = 0.01
"""


def written(folder: Path, text: str) -> Path:
    """Write a sweep file beside the folders that it names, and return its path."""
    for name in ("photos", "masks", "teachers/untrained"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "boxes.json").write_text("{}")
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def test_a_file_has_caches_arms_and_tasks(tmp_path: Path) -> None:
    """Common options reach every arm, its own ones win, and paths start from the file."""
    sweep = read_sweep(written(tmp_path, GOOD))
    assert (sweep.seeds, sweep.baseline, sweep.share) == ((3, 4), "plain", False)
    assert [arm.name for arm in sweep.arms] == ["plain", "at", "random"]
    assert {arm.train.epochs for arm in sweep.arms} == {30}
    assert {arm.train.student_size for arm in sweep.arms} == {"64"}
    assert sweep.arms[1].train.loss == "at"
    assert [arm.caches for arm in sweep.arms] == [("t20",), ("untrained",), ()]
    both = GOOD.replace('cache = "untrained"', 'cache = ["t20", "untrained"]')
    assert read_sweep(written(tmp_path, both)).arms[1].caches == ("t20", "untrained")
    assert sweep.caches[0].path == tmp_path / "t20.cache"
    extract = sweep.caches[1].extract
    assert extract is not None
    assert extract.teacher == str(tmp_path / "teachers/untrained")
    assert extract.timestep == (20,)
    assert sweep.caches[1].images == tmp_path / "photos"
    assert [task.seeds for task in sweep.tasks] == [(0,), (0, 1), (0,), (0,)]
    assert sweep.tasks[2].options.train_boxes == tmp_path / "boxes.json"
    assert [task.options.scores for task in sweep.tasks] == [
        ("knn_top1", "linear_top1"),
        ("miou", "pixel_accuracy"),
        ("ap", "ap50", "ap75", "mask_ap", "mask_ap50", "mask_ap75"),
        ("knn_top1", "linear_top1", "finetuned_top1", "finetuned_top5"),
    ]
    assert sweep.tasks[1].options.train_masks == tmp_path / "masks"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [3, 4]", "seeds = []", r"seeds: expected a list of one or more integers"),
        ("seeds = [3, 4]", "", r"seeds: expected a list of one or more integers"),
        ("seeds = [3, 4]", "seeds = [true]", r"seeds: expected a list of one or more integers"),
        ("seeds = [3, 4]", "seeds = [3, 3]", r"seeds: expected each seed once"),
        ("seeds = [3, 4]", "seeds = [-1]", r"seeds: -1: expected a seed from 0 to"),
        ("seeds =", "seed =", r"sweep\.toml: no option seed; did you mean seeds\?"),
        ("seeds = [3, 4]", "seeds = [3, 4", r"sweep\.toml: not TOML"),
        ('"plain"\n[train]', '"best"\n[train]', r"baseline 'best': expected an arm; the arms are"),
        ('"resnet10t"', '"resnet10t,resnet18"', r"plain: student .*: expected one name; write an"),
        ("epochs = 30", "epoch = 30", r"\[train\]: no option epoch; did you mean epochs\?"),
        ("epochs = 30", "epochs = 0.5", r"plain: \[train\] .*: `epochs` 0.5: expected an integer"),
        ("epochs = 30", "epochs = 0", r"plain: \[train\] and \[arm.train\]: `epochs` 0"),
        ("epochs = 30", "seed = 1", r"\[train\]: seed: expected no seed here; list the seeds"),
        ("epochs = 30", 'extend = "run"', r"\[train\]: extend: expected no finished run here"),
        ('loss = "at"', 'losss = "at"', r"at: \[arm.train\]: no option losss; did you mean loss\?"),
        ('loss = "at"', "compile = 1", r"at: .*: `compile` 1: expected True or False"),
        ('name = "at"', 'name = "plain"', r"\[\[arm\]\] plain: named twice"),
        ('name = "at"', 'name = "PLAIN"', r"\[\[arm\]\] PLAIN: named twice"),
        ('name = "at"', 'name = "../at"', r"name '\.\./at': expected up to 64 letters"),
        ('name = "at"', 'name = "<b>"', r"name '<b>': expected up to 64 letters"),
        ('name = "at"', "", r"\[\[arm\]\]: name missing"),
        ('cache = "t20"', 'cache = "t21"', r"plain: cache 't21': the caches are t20, untrained"),
        ('cache = "t20"', "", r"plain: expected exactly one of cache, .* backbone; got none"),
        ('cache = "t20"', 'cache = "t20"\nstart = "random"', r"exactly one of .* got cache, start"),
        ('start = "random"', 'start = "zero"', r"random: start 'zero': expected \"random\""),
        ('cache = "t20"', 'images = "photos"', r"plain: images: expected a teacher in \[arm.train"),
        (
            'cache = "t20"',
            'backbone = "runs/a"',
            r"plain: backbone: runs/a does not exist; paths ar",
        ),
        ('cache = "t20"', 'images = "nowhere"', r"plain: images: .*nowhere does not exist"),
        (
            'cache = "untrained"',
            'cache = ["t20", "no"]',
            r"arm\]\] at: cache 'no': the caches are t20",
        ),
        ('cache = "untrained"', "cache = []", "cache: expected one or more names, got none"),
        ('path = "t20.cache"', "", r"t20: expected either path \(a sealed cache\) or \[cache.extr"),
        ('path = "t20.cache"', 'path = "t20.cache"\nper_seed = true', r"per_seed: only a cache"),
        ("timestep = 20", "timesteps = 20", r"\[cache.extract\]: no option timesteps; did you me"),
        ("timestep = 20", "seed = 1", r"\[cache.extract\]: seed: expected no seed here"),
        ('images = "photos"\nteacher', "teacher", r"untrained: \[cache.extract\]: images missing"),
        ('images = "photos"\nteacher', 'images = "no"\nteacher', r"untrained: images: .* does not"),
        ('teacher = "teachers/untrained"', "", r"\[cache.extract\]: teacher missing"),
        ("[evaluate.probe]", '[evaluate."a/b"]', r"name 'a/b': expected up to 64 letters"),
        ("[evaluate.probe]", "[evaluate.training]", r"the losses of the training have this name"),
        ('[evaluate.probe]\ntrain = "photos"', "[evaluate.probe]", r"probe\]: train missing; a cl"),
        ('train_masks = "masks"', "", r"scenes\]: train_masks missing; a segmentation task needs"),
        ('train_masks = "masks"', 'train_masks = "m"', r"scenes\]: train_masks: .* does not exist"),
        ("seeds = [0, 1]\n", "seeds = [0]\nseed = 1\n", r"expected either seed or seeds, got both"),
        (
            "seeds = [0, 1]",
            'arms = ["at2"]',
            r"scenes\]: arms: 'at2': the arms are plain, at, random",
        ),
        (
            "seeds = [0, 1]",
            'head = "run"',
            r"scenes\]: head = .run.: arm plain trains no head, as i",
        ),
        ("seeds = [0, 1]", 'teacher = "t"', r"scenes\]: teacher: only the evaluation of a cache u"),
        ('train_boxes = "boxes.json"', "", r"boxes\]: train_boxes missing; a detection task needs"),
        ('train_boxes = "boxes.json"', 'train_boxes = "no"', r"boxes\]: train_boxes: .* does not"),
        ("masks = true", 'test = "photos"', r"boxes\]: .*expected `test_boxes` with `test`"),
        ("masks = true", 'out = "here"', r"boxes\]: out: expected none, as a sweep records"),
        ("masks = true", "label_fraction = 0.1", r"boxes\]: `label_fraction`: not an option of"),
        (
            "label_fraction = 0.01",
            "label_fraction = 2",
            r"few\]: `label_fraction` 2.0: expect",
        ),
        ("seeds = [0, 1]\n", "k = 5\n", r"scenes\]: `k`: not an option of `task='segmentation'`"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    """Each mistake is one line that names the section; nothing is written."""
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        read_sweep(path)
    result = run("sweep", path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_changed_files_are_read_or_refused(tmp_path: Path) -> None:
    """200 sweep files with random values are read, or refused with the file's name."""
    path = written(tmp_path, GOOD)
    table = tomllib.loads(GOOD)
    table["cache"][1]["label"] = {"fit": {"masks": "masks"}, "write": {"name": "parts"}}
    path.write_bytes(toml_bytes(table))
    assert read_sweep(path).caches[1].fit is not None
    refused = 0
    for number in range(200):
        rng = Random(number)
        changed, _ = mutate_json(copy.deepcopy(table), rng)
        try:
            content = toml_bytes(changed)
        except (RecursionError, ValueError):
            continue
        path.write_bytes(mutate_bytes(content, rng)[0] if rng.random() < 0.1 else content)
        try:
            assert read_sweep(path).arms
        except ConfigError as error:
            assert str(path) in str(error)
            refused += 1
    assert 100 < refused < 200


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    """A folder, a missing file, a device and a huge file are refused."""
    with pytest.raises(ConfigError, match=r"expected a file; pass a TOML file"):
        read_sweep(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a file; pass a TOML file"):
        read_sweep(Path("/dev/zero"))
    with pytest.raises(ConfigError, match=r"No such file or directory; pass a TOML file"):
        read_sweep(tmp_path / "none.toml")
    (tmp_path / "big.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match=r"expected at most 1048576 bytes, got 1048577"):
        read_sweep(tmp_path / "big.toml")


def test_a_random_start_needs_an_arm_that_trains(tmp_path: Path) -> None:
    """Without an arm that trains, nothing says what a random start starts."""
    path = written(tmp_path, 'seeds = [0]\n[[arm]]\nname = "random"\nstart = "random"\n')
    with pytest.raises(ConfigError, match=r"random: start: expected an arm that trains too"):
        read_sweep(path)
