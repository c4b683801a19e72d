"""A page of results: what people wrote of them, and below it the tables that a script makes of its JSON files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Records = dict[str, Any]
"""One experiment's records, as `records.write` leaves them, by name."""


def write_page(results: Path, page: Path, script: str, lines_of: Callable[[Records], list[str]]) -> None:
    """Write the tables of every experiment, a folder of results each, below what a page says by hand."""
    mark = f"<!-- What follows is written by benchmarks/{script}. -->"
    lines = [line for folder in sorted(results.iterdir()) if folder.is_dir() for line in _section(folder, lines_of)]
    head = page.read_text().split(mark)[0] if page.exists() else ""
    page.write_text("\n".join([f"{head}{mark}", "", *lines]))


def _section(folder: Path, lines_of: Callable[[Records], list[str]]) -> list[str]:
    """Return one experiment's tables, and how they came about."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    about = sorted({(r["machine"], r["commit"], r["command"]) for r in records.values()})
    shown = [f"{machine}; {commit}\n{command}" for machine, commit, command in about]
    return [f"## {folder.name}", "", *lines_of(records), "Machine, commit and command:", "", "```", *shown, "```", ""]
