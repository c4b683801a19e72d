"""Results as small JSON files: what was run, where, at which commit; a finished run is never repeated."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


def once(path: Path, command: str, run: Callable[[], Any]) -> Any:
    """Return the result in `path`, or run, write it there and return it."""
    if path.exists():
        return json.loads(path.read_text())["result"]
    started = time.time()
    result = run()
    write(path, command, result, time.time() - started)
    return result


def write(path: Path, command: str, result: Any, seconds: float) -> None:
    """Write a result beside its command, wall seconds, machine and commit; a command names no path of the machine."""
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
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
