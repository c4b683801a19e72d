"""Results record their command, and a benchmark reuses a result only for the same command."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks"
RESULTS = ROOT / "docs" / "results"
SKIPPING = (
    "attention_error",
    "cached_vs_online",
    "cifar10",
    "inputs",
    "labels",
    "stored_images",
    "student_vs_size",
)
"""Scripts that skip what is recorded."""
TABLES = ("cached_vs_online", "labels", "student_vs_size")
"""Of these, the ones that prepare images or caches before they look for a record."""


def documented() -> list[str]:
    """Return the commands of these scripts in the documents, one line each."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(re.sub(r"\\\n\s*", "", page.read_text()) for page in pages)
    found = re.findall(r"`(python benchmarks/[^`]*)`", text) + re.findall(
        r"^python benchmarks/.*", text, re.MULTILINE
    )
    named = {" ".join(command.split()).removeprefix("python benchmarks/") for command in found}
    return sorted(c for c in named if c.split(".py")[0] in SKIPPING and "--" in c)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that runs a documented command on a copy of the committed results."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    monkeypatch.syspath_prepend(SCRIPTS)

    def command(line: str) -> Path:
        script, *flags = line.split()
        flags += ["--results", str(folder)] + ["--table"] * (script.removesuffix(".py") in TABLES)
        monkeypatch.setattr(sys, "argv", [script, *flags])
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        return folder

    return command


def test_results_say_how_they_were_made() -> None:
    """Every JSON file of results names its command, machine and commit."""
    files = sorted(RESULTS.rglob("*.json"))
    assert files
    for path in files:
        record = json.loads(path.read_text())
        assert all(isinstance(record.get(key), str) for key in ("command", "machine", "commit")), (
            path
        )


def test_the_documents_name_commands() -> None:
    """README and pages name a command for every script with committed results."""
    assert {c.split(".py")[0] for c in documented()} >= {*SKIPPING} - {"labels"}


@pytest.mark.parametrize("line", documented())
def test_committed_results_are_those_of_the_documented_commands(line: str, run: Any) -> None:
    """Every documented command accepts the committed records and gives the committed tables."""
    folder = run(line)
    for made in folder.rglob("*.md"):
        assert made.read_text() == (RESULTS / made.relative_to(folder)).read_text()


EXPERIMENT = "--train TRAIN --test TEST --teacher TEACHER --timestep 20"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "student_vs_size.py --epochs 100",
            "Expected --epochs 12, got --epochs 100. Pass another --name or --results.",
        ),
        (
            "cached_vs_online.py --student-size 32 --images 1000 --probe-images 4000",
            r"Expected --compile on, got --compile not given\.",
        ),
        (
            "cached_vs_online.py --student-size 32 --images 1000 --probe-images 4000 --compile "
            "--scenes 9",
            "Expected --scenes 300, got --scenes 9.",
        ),
    ],
)
def test_results_of_other_flags_are_refused(line: str, message: str, run: Any) -> None:
    """A flag that changes results stops the script before it writes tables."""
    with pytest.raises(SystemExit, match=message):
        run(f"{line} {EXPERIMENT}")


def test_a_result_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second call with the same command returns the first result without measuring.

    Paths, amounts and default values do not count as differences.
    """
    monkeypatch.syspath_prepend(SCRIPTS)
    from records import Results

    first = Results(folder=tmp_path, command="x --out a/c --rounds 3")
    assert first.once("r", lambda: [1]) == [1]
    later = Results(
        folder=tmp_path,
        command="x --out b/c --rounds 5 --size 64",
        defaults="x --size 64",
        amounts=("--rounds",),
    )
    assert later.once("r", lambda: [2]) == [1]
    assert later.read()["r"]["command"] == first.command
    other = Results(
        folder=tmp_path,
        command="x --out b/c --size 32",
        defaults="x --size 64",
        amounts=("--rounds",),
    )
    with pytest.raises(
        SystemExit, match=r"Expected --size 64, got --size 32\. Pass another --results\."
    ):
        other.once("r", lambda: [2])
