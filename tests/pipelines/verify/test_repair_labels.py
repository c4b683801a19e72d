"""Label sets in `dtcache verify`: repair of damage, and a report of newer formats."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from store.builders import tree
from support.cli import run
from support.files import flip
from support.interrupts import interrupt

from cli import main
from dtcache.atomic_files import FolderLock
from dtcache.errors import ConfigError
from dtcache.options import VerifyOptions
from dtcache.store import writer
from pipelines.label.label_writer import LabelWriter
from pipelines.verify.verify import verify

SET = "labels/parts"
SHARD = f"{SET}/data.zarr/t0/c.1.0.0"


def repair(root: Path, *flags: object) -> tuple[Result, dict[str, tuple[str, str]]]:
    """Run the repair; return the result, and outcome and note of each file."""
    result = run("verify", root, "--repair", *flags, "--json")
    lines = json.loads(result.stdout)["repair"] if result.stdout else []
    return result, {line["path"]: (line["outcome"], line["note"]) for line in lines}


@pytest.fixture
def root(labelled: Path, tmp_path: Path) -> Path:
    """A copy of a cache with a label set, to be damaged."""
    return Path(shutil.copytree(labelled, tmp_path / "cache"))


def test_damaged_files_of_a_label_set_come_back_byte_for_byte(
    root: Path, interpreter: Path
) -> None:
    """Damaged label shards and Zarr nodes are restored without images and teacher."""
    wanted = tree(root)
    flip(root / SHARD)
    os.truncate(root / SHARD.replace("c.1", "c.2"), 9)
    (root / SHARD.replace("c.1", "c.0")).unlink()
    for path in list((root / SET / "data.zarr").rglob("zarr.json")):
        path.unlink()
    result, said = repair(root, "--interpreter", interpreter)
    assert result.exit_code == 0, result.output
    assert {outcome for outcome, _ in said.values()} == {"repaired"}
    assert {path for path in said if "zarr.json" not in path} == {
        SHARD.replace("c.1", f"c.{i}") for i in range(3)
    }
    assert tree(root) == wanted


def test_features_are_repaired_before_the_labels_that_follow_from_them(
    root: Path, interpreter: Path, scene_folder: Path, teacher_dir: Path
) -> None:
    """Labels of damaged features are repaired only after the features, or name what is missing."""
    wanted = tree(root)
    feature = "data.zarr/t150/c.1.0.0"
    (root / feature).unlink()
    (root / SHARD).unlink()
    before = tree(root)
    result, said = repair(root, "--interpreter", interpreter)
    assert result.exit_code == 3
    assert said[feature] == ("refused", "pass --images and --teacher, from which it is computed")
    assert said[SHARD][0] == "refused"
    assert f"{feature}: expected" in said[SHARD][1]
    assert tree(root) == before
    result, said = repair(
        root, "--interpreter", interpreter, "--images", scene_folder, "--teacher", teacher_dir
    )
    assert result.exit_code == 0, said
    assert tree(root) == wanted


def test_an_unfinished_label_set_is_repaired_too(
    scene_cache: Path,
    labelled: Path,
    interpreter: Path,
    scene_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A committed shard of a killed label write is restored, and a resume ends in equal bytes."""
    root = Path(shutil.copytree(scene_cache, tmp_path / "cache"))
    command = [
        "label",
        "write",
        root,
        interpreter,
        "--name",
        "parts",
        "--masks",
        scene_folder.parent / "masks",
    ]
    with monkeypatch.context() as patch:
        interrupt(patch, writer, "write_attempt", 3)
        assert CliRunner().invoke(main, [*map(str, command)]).exit_code == 130
    (root / SHARD).unlink()
    record = root / SET / "commits" / "000000.json"
    flip(record)
    result, said = repair(root, "--interpreter", interpreter)
    assert result.exit_code == 3
    assert said[SHARD] == ("repaired", "it has the recorded SHA-256")
    advice = "delete it and run dtcache label write again, which recomputes the shard"
    assert said[f"{SET}/commits/000000.json"] == ("impossible", advice)
    record.unlink()
    assert CliRunner().invoke(main, [*map(str, command)]).exit_code == 0
    assert tree(root) == tree(labelled)


def test_what_cannot_be_repaired_is_left_and_said(
    root: Path,
    interpreter: Path,
    scene_folder: Path,
    teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A label set that cannot be repaired is left unchanged and reported with the reason."""
    flip(root / SHARD)
    before = tree(root)
    other = Path(shutil.copytree(interpreter, tmp_path / "other"))
    flip(other / "model.safetensors", -1)
    for flags in (["--interpreter", other], ["--images", scene_folder, "--teacher", teacher_dir]):
        result, said = repair(root, *flags)
        assert result.exit_code == 3
        assert said[SHARD][0] == "refused"
        assert (
            "pass --interpreter, the one that wrote the label set, with weights of SHA-256 "
            in said[SHARD][1]
        )
    with monkeypatch.context() as patch:
        real = LabelWriter.logits
        patch.setattr(LabelWriter, "logits", lambda job, rows: 1.5 * real(job, rows).flip(2))
        result, said = repair(root, "--interpreter", interpreter)
    assert result.exit_code == 3
    assert (
        "the recomputed bytes do not have the recorded SHA-256, so they were not written; repair on"
        in said[SHARD][1]
    )
    (root / SET / "shards.parquet").unlink()
    result, said = repair(root, "--interpreter", interpreter)
    again = "delete labels/parts and run dtcache label write again"
    assert said[f"{SET}/shards.parquet"] == (
        "refused",
        f"the files that it is rebuilt from are damaged too; {again}",
    )
    assert "the record of its SHA-256 is damaged too" in said[SHARD][1]
    flip(root / SHARD)
    result, said = repair(root, "--interpreter", interpreter)
    assert (result.exit_code, said) == (
        0,
        {f"{SET}/shards.parquet": ("repaired", "it has the recorded SHA-256")},
    )
    flip(root / SHARD)
    assert tree(root) == before
    flip(root / SET / "codec.safetensors.zst")
    result, said = repair(root, "--interpreter", interpreter)
    assert "the codec's arrays are damaged" in said[SHARD][1]
    flip(root / SET / "manifest.json", 30)
    result, said = repair(root, "--interpreter", interpreter)
    assert said == {f"{SET}/manifest.json": ("impossible", f"restore it from a copy, or {again}")}


def test_the_plan_names_the_flags_that_are_missing(root: Path) -> None:
    """--repair --dry-run shows what a label set's repair does and needs, and writes nothing."""
    flip(root / SHARD)
    before = tree(root)
    output = " ".join(run("verify", root, "--repair", "--dry-run").output.split())
    assert f"planned: {SHARD}: recompute shard 1 (16 images) with the interpreter" in output
    assert "nothing was written; to repair, pass --interpreter and leave out --dry-run" in output
    flip(root / "data.zarr/images/c.0.0")
    output = " ".join(run("verify", root, "--repair", "--dry-run").output.split())
    assert (
        "to repair, pass --images and --teacher and --interpreter and leave out --dry-run" in output
    )
    flip(root / "data.zarr/images/c.0.0")
    assert tree(root) == before
    with pytest.raises(
        ConfigError, match="`images`, `teacher` and `interpreter`: expected `repair` with them"
    ):
        verify(root, VerifyOptions(interpreter=root))


def test_a_label_set_that_is_being_written_is_not_repaired(root: Path, interpreter: Path) -> None:
    """A repair skips a label set whose lock another process holds, and names the set."""
    with FolderLock(root / SET):
        result, _ = repair(root, "--interpreter", interpreter)
    assert result.exit_code == 1
    assert (
        f"{root / SET} is being written by another process; wait for it or stop it" in result.stderr
    )


def test_a_label_set_of_a_newer_format_is_named_and_the_cache_verified(
    root: Path, interpreter: Path
) -> None:
    """A newer label set gives exit code 5, and damage elsewhere is found with exit code 3."""
    shutil.copytree(root / SET, root / "labels" / "newer")
    path = root / "labels" / "newer" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    before = tree(root)
    result = run("verify", root)
    assert result.exit_code == 5
    text = " ".join(re.sub(r"[│\s]+", " ", result.output).split())
    reason = "expected format 2, got 3; install the dtcache that wrote it, or a newer one"
    assert f"labels newer not readable by this version: {reason}" in text
    assert "state good" in text and "labels parts good" in text
    found = json.loads(run("verify", root, "--json").stdout)
    assert (found["state"], found["damage"], found["labels"]["parts"]["state"]) == (
        "unreadable",
        [],
        "good",
    )
    assert found["labels"]["newer"] == {"state": "unreadable", "reason": reason}
    flip(root / SHARD)
    assert run("verify", root).exit_code == 3
    result, said = repair(root, "--interpreter", interpreter)
    assert (result.exit_code, list(said)) == (5, [SHARD])
    assert tree(root) == before
