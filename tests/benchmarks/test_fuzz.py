"""A short run of the fuzz tests; `benchmarks/fuzz.py` runs as many inputs as one likes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"


@pytest.mark.slow
def test_hostile_inputs_succeed_or_are_refused_in_one_line(tmp_path: Path) -> None:
    """40 hostile inputs cause no failure of any class."""
    command = [
        sys.executable,
        SCRIPT,
        "--count",
        "40",
        "--jobs",
        "2",
        "--seed",
        "1",
        "--results",
        tmp_path,
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=850
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "fuzz.json").read_text())["result"]
    assert result["failures"] == []
    assert set(result["verdicts"]) == {"ok", "refused"}
    assert sum(result["verdicts"].values()) == result["inputs"] == 40
    assert min(result["verdicts"].values()) > 5
    assert len(result["by_command"]) > 8
