"""Write results as small JSON files with command, machine and commit; reuse recorded results."""

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
"""Words of recorded commands, and their present names."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """A folder with the results of one command, one JSON file per result."""

    folder: Path
    command: str
    """The command that computes the results."""
    defaults: str = ""
    """The command with the default of every flag, for flags that a recorded command lacks."""
    amounts: tuple[str, ...] = ()
    """Flags that select results or set the number of repetitions. They change no single result."""

    def once(self, name: str, run: Callable[[], Any]) -> Any:
        """Return the recorded result of this name; if there is none, call `run` and record it.

        Raises SystemExit if the result was recorded with other flags.
        """
        path = self.folder / f"{name}.json"
        if path.exists():
            return self._checked(path)["result"]
        started = time.time()
        result = run()
        write(path, self.command, result, time.time() - started)
        return result

    def read(self) -> dict[str, Any]:
        """Return all records by name. Raises SystemExit if one was recorded with other flags."""
        return {path.stem: self._checked(path) for path in sorted(self.folder.glob("*.json"))}

    def _checked(self, path: Path) -> dict[str, Any]:
        """Return a record. Raises SystemExit if its flags differ from those of the command."""
        record: dict[str, Any] = json.loads(path.read_text())
        recorded, current, defaults = (
            flags_of(with_todays_names(text))
            for text in (record["command"], self.command, self.defaults)
        )
        for flag in sorted({*recorded, *current} - {*self.amounts}):
            expected, got = (
                flags.get(flag, defaults.get(flag, "not given")) for flags in (recorded, current)
            )
            if expected != got:
                others = "another --name or" if "--name" in current else "another"
                raise SystemExit(
                    f"{path}: recorded with other flags. Expected {flag} {expected}, got {flag} "
                    f"{got}. Pass {others} --results."
                )
        return record


def results_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the folder of the results."""
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the results [docs/results]"
    )


def command_of(script: str, values: Mapping[str, Any], inputs: tuple[str, ...] = ()) -> str:
    """Return a script's command with the flags of `values`.

    The flags in `inputs` have placeholders as values (`--data DATA`), so that the command contains
    no path of this machine. False and None add no flag; True adds a flag without a value.
    """
    words = [f"python benchmarks/{script}"]
    for name, value in values.items():
        if value is not None and value is not False:
            shown = name.upper() if name in inputs else value
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {shown}"))
    return " ".join(words)


def with_todays_names(command: str) -> str:
    """Return a recorded command with the present names of its words."""
    for old, new in RENAMED.items():
        command = command.replace(old, new)
    return command


def flags_of(command: str) -> dict[str, str]:
    """Return the value of each flag of a command, "on" for a flag without a value.

    A path is reduced to its last component, so that files may be moved. Words before the first flag
    are the value of the key `command`.
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
    """Write a result with its command, wall seconds, machine and commit.

    The command must contain no path of this machine.
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
    """Return the number and architecture of the CPU cores, and the name of the GPU if any."""
    words = {1: "one", 2: "two", 4: "four", 8: "eight", 16: "sixteen"}
    count = os.cpu_count() or 0
    cores = f"{words.get(count, count)} {platform.machine().replace('_', '-')} cores"
    return f"{cores}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cores


def commit() -> str:
    """Return the short hash of the checked-out commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.strip()
