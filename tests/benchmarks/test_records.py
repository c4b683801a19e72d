"""Results name their command, machine and commit, and documents name commands that exist."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks"
RESULTS = ROOT / "docs" / "results"


def test_results_name_their_command_machine_and_commit() -> None:
    """Every JSON file of results names its command, machine and commit."""
    files = sorted(RESULTS.rglob("*.json"))
    assert files
    for path in files:
        record = json.loads(path.read_text())
        assert all(isinstance(record.get(key), str) for key in ("command", "machine", "commit")), (
            path
        )


def test_the_documents_name_scripts_and_flags_that_exist() -> None:
    """Every command of a script in README and docs names an existing script and its flags.

    Commands in a record of a page, which begins with machine and commit, are those of that commit.
    """
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(re.sub(r"\\\n\s*", "", page.read_text()) for page in pages)
    text = re.sub(r"```\n[a-z0-9]+ x86-64 cores; .*?```", "", text, flags=re.DOTALL)
    commands = re.findall(r"python benchmarks/([a-z_]+\.py)([^`\n]*)", text)
    assert len(commands) > 8
    for script, arguments in commands:
        path = SCRIPTS / script
        assert path.is_file(), script
        for flag in re.findall(r"--[a-z-]+", arguments):
            assert f'"{flag}"' in path.read_text() or flag == "--results", f"{script} {flag}"
