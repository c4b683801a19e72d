"""Write results as small JSON files with command, machine and commit."""

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


def results_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the folder of the results."""
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the results [docs/results]"
    )


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
