"""Results as small JSON files: command, machine, commit and result; a finished run is not
repeated.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
RENAMED = {"dtcache teach ": "dtcache teacher train ", "--weights float16": "--weights fp16"}
"""Words of recorded commands that have another name today."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of one command, one JSON file per result."""

    folder: Path
    command: str
    """The command that makes the results."""
    defaults: str = ""
    """The command with all default flags: the values of flags that a record does not name.
    """
    amounts: tuple[str, ...] = ()
    """Flags that select results or repeat timings but do not change a result."""

    def once(self, name: str, run: Callable[[], Any]) -> Any:
        """Return the result of this name, or run, write it and return it; exit where another
        command made it.
        """
        path = self.folder / f"{name}.json"
        if path.exists():
            return self._checked(path)["result"]
        started = time.time()
        result = run()
        write(path, self.command, result, time.time() - started)
        return result

    def read(self) -> dict[str, Any]:
        """Return all records by name; exit where another command made one."""
        return {path.stem: self._checked(path) for path in sorted(self.folder.glob("*.json"))}

    def _checked(self, path: Path) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(path.read_text())
        made, asked, usual = (
            flags_of(with_todays_names(text))
            for text in (record["command"], self.command, self.defaults)
        )
        for flag in sorted({*made, *asked} - {*self.amounts}):
            was, now = (flags.get(flag, usual.get(flag, "not given")) for flags in (made, asked))
            if was != now:
                others = "another --name or --results" if "--name" in asked else "another --results"
                raise SystemExit(
                    f"{path}: recorded with {flag} {was}, asked for {flag} {now}; give {others}"
                )
        return record


def results_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says where results lie."""
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the results [docs/results]"
    )


def command_of(script: str, values: Mapping[str, Any], inputs: tuple[str, ...] = ()) -> str:
    """Return a script's command; inputs are shown by their names, since a command names no path of
    the machine.
    """
    words = [f"python benchmarks/{script}"]
    for name, value in values.items():
        if value is not None and value is not False:
            shown = name.upper() if name in inputs else value
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {shown}"))
    return " ".join(words)


def with_todays_names(command: str) -> str:
    """Return a recorded command with the names that its words have today."""
    for then, now in RENAMED.items():
        command = command.replace(then, now)
    return command


def flags_of(command: str) -> dict[str, str]:
    """Return a command's flags and what each is given; a path counts by its name, since it may lie
    anywhere.
    """
    flags: dict[str, list[str]] = {}
    flag = "command"
    for word in command.split():
        if word.startswith("--"):
            flag = word
            flags.setdefault(flag, [])
        else:
            flags.setdefault(flag, []).append(Path(word).name)
    return {flag: " ".join(words) or "on" for flag, words in flags.items()}


def write(path: Path, command: str, result: Any, seconds: float) -> None:
    """Write a result beside its command, wall seconds, machine and commit; a command names no path
    of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": command,
        "seconds": round(seconds, 1),
        "machine": machine(),
        "commit": commit(),
        "result": result,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def machine() -> str:
    """Return the machine in words."""
    words = {1: "one", 2: "two", 4: "four", 8: "eight", 16: "sixteen"}
    count = os.cpu_count() or 0
    cores = f"{words.get(count, count)} {platform.machine().replace('_', '-')} cores"
    return f"{cores}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cores


def commit() -> str:
    """Return the commit that the working tree is at."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.strip()
