"""The folder of an evaluation that trains: its checkpoint, metrics, result and pictures."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import nn

from dtcache.atomic_files import FolderLock, write_file
from dtcache.optim import Optimization, require_same_tensors
from dtcache.options import EvaluateOptions
from dtcache.recipe import Json
from pipelines.runs.checkpoint import (
    checkpoint_errors,
    load_checkpoint,
    require_number,
    save_checkpoint,
)
from pipelines.runs.folder import claim_run
from pipelines.runs.metrics import MetricsFile, NoMetrics
from pipelines.runs.trackers import NoTracker

RESULT = "evaluation.json"
PICTURE = "predictions.png"
VOLATILE = ("device", "out")
"""Options that may change on resume."""
SAVE_SECONDS = 60.0
"""Least seconds between two checkpoints."""


class EvaluationFolder(Protocol):
    """What an evaluation writes."""

    def restore(self, network: nn.Module, optimization: Optimization, total_steps: int) -> int:
        """Continue from the checkpoint, if there is one. Returns the steps that are done."""

    def save(
        self, network: nn.Module, optimization: Optimization, step: int, is_last: bool
    ) -> None:
        """Write a checkpoint after `step` steps, if the last one is old or this one is the last."""

    def metrics(self, step: int) -> MetricsFile | NoMetrics:
        """Return the metrics file, continued after `step`."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file."""


class NoFolder:
    """Writes nothing: an evaluation that cannot be resumed."""

    def restore(self, network: nn.Module, optimization: Optimization, total_steps: int) -> int:
        """Return 0."""
        return 0

    def save(
        self, network: nn.Module, optimization: Optimization, step: int, is_last: bool
    ) -> None:
        """Do nothing."""

    def metrics(self, step: int) -> NoMetrics:
        """Return metrics that are discarded."""
        return NoMetrics()

    def write(self, name: str, data: bytes) -> None:
        """Do nothing."""


class _Folder:
    def __init__(self, out: Path, lock: FolderLock) -> None:
        self._out = out
        self._lock = lock
        self._saved = time.monotonic()

    def restore(self, network: nn.Module, optimization: Optimization, total_steps: int) -> int:
        state = load_checkpoint(self._out)
        if state is None:
            return 0
        with checkpoint_errors(self._out):
            require_number("step", state["step"], kind=int, most=total_steps)
            require_same_tensors("network", network.state_dict(), state["network"])
            optimization.load_state_dict(state)
            network.load_state_dict(state["network"])
        return int(state["step"])

    def save(
        self, network: nn.Module, optimization: Optimization, step: int, is_last: bool
    ) -> None:
        if not is_last and time.monotonic() - self._saved < SAVE_SECONDS:
            return
        state = {"step": step, "network": network.state_dict(), **optimization.state_dict()}
        save_checkpoint(self._out, state)
        self._lock.keep()
        self._saved = time.monotonic()

    def metrics(self, step: int) -> MetricsFile:
        return MetricsFile(self._out, step, NoTracker())

    def write(self, name: str, data: bytes) -> None:
        write_file(self._out / name, data)


@contextmanager
def evaluation_folder(
    model: str, options: EvaluateOptions, data_sha256: str, network: nn.Module
) -> Iterator[EvaluationFolder]:
    """Open `options.out`, or a folder that writes nothing if it is None.

    The options, the model, the data and the initial weights of `network` identify the evaluation.
    Raises CacheMismatchError if the folder holds another one, and CacheBusyError.
    """
    if options.out is None:
        yield NoFolder()
        return
    identity: Json = {
        **options.identity(),
        "model": model,
        "data": data_sha256,
        "weights": _weights_sha256(network),
    }
    with FolderLock(options.out) as lock:
        claim_run(options.out, identity, VOLATILE)
        yield _Folder(options.out, lock)


def result_file(result: Json) -> bytes:
    """Return the content of `RESULT`."""
    return json.dumps(result, indent=1).encode() + b"\n"


def _weights_sha256(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
