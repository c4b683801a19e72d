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


def once(path: Path, command: str, run: Callable[[], Any]) -> Any:
    """Return the result in `path`, or run, write it there with machine, command and commit, and return it."""
    if path.exists():
        return json.loads(path.read_text())["result"]
    started = time.time()
    result = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = round(time.time() - started, 1)
    record = {"command": command, "seconds": seconds, "machine": machine(), "commit": commit(), "result": result}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return result


def machine() -> str:
    """Return the machine in words."""
    cores = f"{len(os.sched_getaffinity(0))} {platform.machine()} cores"
    return f"{cores}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cores


def commit() -> str:
    """Return the commit that the working tree is at."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
