"""The demonstration runs every stage once, prints one table and repeats nothing."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.cli import words

from cli import main

FLAGS = words(
    "--train-images 70 --test-images 40 --epochs 1 --batch-size 16 --fpn-width 8 "
    "--students resnet10t,mobilenetv3_small_100"
)


def demo(out: Path, *more: str) -> Result:
    """Run the demonstration at a much smaller size."""
    return CliRunner().invoke(main, ["demo", "--out", str(out), *FLAGS, *more])


@pytest.mark.slow
def test_demo_runs_every_stage_and_resumes(tmp_path: Path) -> None:
    """The summary has sizes, seconds and two rows per student, and a second run repeats nothing."""
    out = tmp_path / "demo"
    result = demo(out)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    students = ("resnet10t", "mobilenetv3_small_100")
    names = [
        f"{student}, {kind}" for student in students for kind in ("random init", "from the cache")
    ]
    assert [student["name"] for student in summary["students"]] == names
    for student in summary["students"]:
        assert 0 <= student["knn_top1"] <= 100
        assert 0 <= student["linear_top1"] <= 100
    assert summary["num_images"] == 70
    assert summary["ratio"] == pytest.approx(
        summary["fp16_bytes_per_image"] / summary["bytes_per_image"]
    )
    report = json.loads(CliRunner().invoke(main, ["inspect", str(out / "cache"), "--json"]).stdout)
    features = sum(size for part, size in report["parts"].items() if part != "images")
    assert summary["bytes_per_image"] * 70 == pytest.approx(features)
    assert summary["stored_image_bytes_per_image"] * 70 == pytest.approx(report["parts"]["images"])
    assert f"stored images take {report['parts']['images'] / 70:.0f} bytes more" in " ".join(
        result.output.split()
    )
    assert {"scenes", "extract", "train resnet10t", "train mobilenetv3_small_100"} <= set(
        summary["seconds"]
    )
    stamps = {
        p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "summary.json"
    }
    again = demo(out)
    assert again.exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert json.loads((out / "summary.json").read_text()) == summary
    for name in names:
        assert name in again.output


def test_demo_refuses_a_folder_of_other_options(tmp_path: Path) -> None:
    """A folder of other options, or with foreign files, is refused and left unchanged."""
    (tmp_path / "thesis.tex").write_text("precious")
    result = demo(tmp_path)
    assert result.exit_code == 2
    assert "is not empty and holds no run: found thesis.tex" in result.output
