"""Runs of `dtcache inspect`, and its documentation."""

import re
from pathlib import Path

from click.testing import CliRunner, Result

from cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs" / "inspect.md"


def inspect(*arguments: object, **variables: str) -> Result:
    """Run `dtcache inspect` in this process, with environment variables."""
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)], env=variables)


def page_of(root: Path, out: Path, *more: object) -> str:
    """Write the page of a cache or a run and return it."""
    result = inspect(root, "--report", out, *more)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.output.replace("\n", "")
    return out.read_text()


def documented(kind: str) -> list[str]:
    """Return the fields that docs/inspect.md lists for the JSON of `kind`."""
    section = DOCS.read_text().partition(f"## JSON of {kind}\n")[2].partition("\n## ")[0]
    return sorted(re.findall(r"^\| `([a-z0-9_.\[\]]+)`", section, re.M))
