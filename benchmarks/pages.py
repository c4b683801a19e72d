"""A page of results: hand-written text, and below it the tables made from JSON files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Records = dict[str, Any]
"""One experiment's records, as `records.write` leaves them, by name."""


def write_page(
    experiments: Path, page: str, script: str, lines_of: Callable[[Records], list[str]]
) -> None:
    """Write the tables of every experiment (one folder each) below the page's hand-written text."""
    mark = f"<!-- What follows is written by benchmarks/{script}. -->"
    path = experiments.parent / page
    lines = [
        line for folder in sorted(experiments.glob("*/")) for line in _section(folder, lines_of)
    ]
    head = path.read_text().split(mark)[0] if path.exists() else ""
    write_lines(path, [f"{head}{mark}", "", *lines])


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def about(records: Records) -> list[str]:
    """Return machine, commit and command of every kind of record, as a block."""
    kinds = sorted({(r["machine"], r["commit"], r["command"]) for r in records.values()})
    shown = [f"{machine}; {commit}\n{command}" for machine, commit, command in kinds]
    return ["Machine, commit and command:", "", "```", *shown, "```", ""]


def _section(folder: Path, lines_of: Callable[[Records], list[str]]) -> list[str]:
    """Return one experiment's tables, and its machines, commits and commands."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return [f"## {folder.name}", "", *lines_of(records), *about(records)]
