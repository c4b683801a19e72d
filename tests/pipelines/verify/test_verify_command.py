"""Verify through the command line: exit codes, text for the terminal, and JSON."""

import json
import re
from pathlib import Path

import pytest
from store.builders import FEATURES, begin, tiny_plan, tree
from support.cli import run
from support.files import flip

from dtcache.errors import ConfigError
from dtcache.options import VerifyOptions
from pipelines.verify import report as verify_report
from pipelines.verify.verify import verify

pytestmark = pytest.mark.usefixtures("apart")

SHARD = f"data.zarr/{FEATURES}/c.1.0.0"


def test_each_verdict_has_its_exit_code(tiny_copy: Path, tmp_path: Path) -> None:
    """Exit codes: 0 good, 2 usage, 3 damaged, 4 unfinished, 5 not readable, 1 other failures."""
    assert run("verify", tiny_copy).exit_code == 0
    flip(tiny_copy / SHARD)
    assert run("verify", tiny_copy).exit_code == 3
    begin(tmp_path / "begun", tiny_plan()).write_shard(tiny_plan().shards[0])
    assert run("verify", tmp_path / "begun").exit_code == 4
    flip(tmp_path / "begun" / "data.zarr" / FEATURES / "c.0.0.0")
    assert run("verify", tmp_path / "begun").exit_code == 3
    nothing = run("verify", tmp_path)
    assert (nothing.exit_code, nothing.stdout) == (5, "")
    assert (
        "is not a cache: expected manifest.json in it; pass a folder made by dtcache extract"
        in nothing.stderr
    )
    missing = run("verify", tmp_path / "nowhere")
    assert missing.exit_code == 2
    assert f"{tmp_path / 'nowhere'} is not a cache" in missing.stderr
    (tiny_copy / "manifest.json").write_text('{"format":3}')
    assert run("verify", tiny_copy).exit_code == 5
    assert run("verify", tiny_copy, "--samples", "0.05").exit_code == 2
    assert run("verify", tiny_copy, "--fraction", "5%").exit_code == 2
    assert run("verify", tiny_copy, "--fraction", "5").exit_code == 2


def test_damage_is_told_by_file_sample_and_remedy(tiny_copy: Path) -> None:
    """The text names the file, what was expected, shard, tap, key, view and the remedy."""
    flip(tiny_copy / SHARD)
    flip(tiny_copy / "samples.parquet", 60)
    key = tiny_plan().samples[4].key
    output = " ".join(run("verify", tiny_copy).output.split())
    assert "DAMAGED" in output and "every byte" in output
    assert f"{SHARD}: 1 of its chunks: the checksum does not match" in output
    assert "shard 1 of t150: row 4 view 0 run dtcache verify with --repair and" in output
    assert "samples.parquet: expected SHA-256" in output
    assert "restore it from a copy, or delete this cache and extract it again" in output
    flip(tiny_copy / "samples.parquet", 60)
    assert f"shard 1 of t150: {key} view 0" in " ".join(run("verify", tiny_copy).output.split())


def test_many_damages_are_cut_short(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal shows the first damaged files and the number of the others."""
    monkeypatch.setattr(verify_report, "SHOWN", 4)
    for path in (tiny_copy / "data.zarr").rglob("*"):
        if path.is_file():
            path.unlink()
    output = run("verify", tiny_copy).output
    assert output.count("no file") == 4
    assert "and 5 more; the JSON report lists all" in output


def test_json_is_json_and_nothing_else(tiny_copy: Path) -> None:
    """Stdout is pure JSON with shard, array, rows, keys and views of each damage."""
    flip(tiny_copy / SHARD)
    (tiny_copy / "notes.txt").write_text("mine")
    result = run("verify", tiny_copy, "--json", "--repair", "--dry-run")
    report = json.loads(result.stdout)
    assert result.exit_code == 3
    assert (report["state"], report["sealed"], report["num_objects"], report["num_checked"]) == (
        "damaged",
        True,
        6,
        6,
    )
    [damage] = report["damage"]
    assert (damage["path"], damage["shard"], damage["array"]) == (SHARD, 1, FEATURES)
    assert damage["samples"] == [{"row": 4, "key": tiny_plan().samples[4].key, "view": 0}]
    assert report["unnamed"] == {"notes.txt": "not part of the cache"}
    note = "recompute shard 1 (4 images) with the teacher"
    assert report["repair"] == [{"path": SHARD, "outcome": "planned", "note": note}]


def test_a_sample_is_called_one(tiny_copy: Path) -> None:
    """With --fraction the text states the number of checked files, which --seed selects."""
    output = run("verify", tiny_copy, "--fraction", 0.05, "--seed", 4).output
    assert "A SAMPLE: 2 of 6 shard files" in output
    report = json.loads(run("verify", tiny_copy, "--fraction", 0.4, "--json").stdout)
    assert (report["num_checked"], report["num_objects"]) == (4, 6)


def test_the_plan_of_a_repair_writes_nothing(tiny_copy: Path) -> None:
    """--repair --dry-run shows per file the repair or its obstacle, and writes nothing."""
    flip(tiny_copy / SHARD)
    (tiny_copy / "data.zarr" / "zarr.json").unlink()
    flip(tiny_copy / "samples.parquet")
    before = tree(tiny_copy)
    result = run("verify", tiny_copy, "--repair", "--dry-run")
    assert result.exit_code == 3
    output = " ".join(result.output.split())
    assert f"planned: {SHARD}: recompute shard 1 (4 images) with the teacher" in output
    assert "planned: data.zarr/zarr.json: rebuild it from the other files" in output
    assert "impossible: samples.parquet: restore it from a copy" in output
    assert (
        "nothing was written; to repair, pass --images and --teacher and leave out --dry-run"
        in output
    )
    assert tree(tiny_copy) == before


def test_a_repair_needs_images_and_teacher(tiny_copy: Path) -> None:
    """--repair without images and teacher is refused with what is missing; nothing is written."""
    flip(tiny_copy / SHARD)
    before = tree(tiny_copy)
    needed = "needs {}images{} and {}teacher{} (features) or {}interpreter{} (labels)"
    with pytest.raises(ConfigError, match=re.escape(needed.format(*"``````"))):
        verify(tiny_copy, VerifyOptions(repair=True))
    result = run("verify", tiny_copy, "--repair")
    assert result.exit_code == 2
    assert f"--repair {needed.format(*['--', ''] * 3)}" in result.stderr
    assert tree(tiny_copy) == before


def test_a_dry_run_is_that_of_a_repair(tiny_copy: Path) -> None:
    """--dry-run without --repair is refused in one line."""
    result = run("verify", tiny_copy, "--dry-run")
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "--dry-run: expected --repair with it" in result.output


@pytest.mark.parametrize("fraction", [0.0, 1.01, -0.01, 5, float("nan")])
def test_a_fraction_is_a_share(tiny_cache: Path, fraction: float) -> None:
    """A fraction outside (0, 1] is refused with the name of the field or of the flag."""
    with pytest.raises(ConfigError, match=r"fraction.* expected a"):
        verify(tiny_cache, VerifyOptions(fraction=fraction))
    assert "--fraction " in run("verify", tiny_cache, "--fraction", fraction).stderr


def test_a_newer_cache_is_one_line_on_stderr(tiny_copy: Path) -> None:
    """A cache of a newer format gives one line on stderr."""
    (tiny_copy / "manifest.json").write_text('{"format":3}')
    result = run("verify", tiny_copy)
    assert (result.exit_code, result.stdout) == (5, "")
    assert "expected format 2, got 3" in result.stderr and result.stderr.count("\n") == 1
