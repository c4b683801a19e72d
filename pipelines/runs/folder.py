"""What every resumable run folder has: its options, its checkpoint, its metrics, its clock."""

import io
import json
import pickle
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.tensorboard import SummaryWriter

from dtcache.atomic_files import disk_errors, write_file
from dtcache.errors import CacheDamagedError, CacheMismatchError
from dtcache.recipe import Json

RUN = "run.json"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
CONFIG = "config.toml"
SUMMARY = "summary.json"

T = TypeVar("T")


def claim_run(out: Path, wanted: Json, volatile: Collection[str]) -> None:
    """Record in `out/run.json` what the run is; fields named `volatile` may differ when it is resumed.

    Raises CacheMismatchError where the folder holds a run of other options, naming the field, or other files.
    """
    path = out / RUN
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(wanted, default=str))
    if not path.exists():
        foreign = sorted(p.name for p in out.iterdir() if p.name != ".lock")
        if foreign:
            raise CacheMismatchError(
                f"{out} is not empty and holds no run: found {foreign[0]}; give an --out that is new"
            )
        write_file(path, json.dumps(wanted, indent=1).encode())
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CacheDamagedError(f"{path}: not JSON ({error}); give another --out") from error
    for name, value in wanted.items():
        if name not in volatile and found.get(name) != value:
            raise CacheMismatchError(
                f"{out} holds a run with another {name}: {found.get(name)!r} there, {value!r} was asked for; "
                "give the same options to resume it, or another --out"
            )


def save_checkpoint(out: Path, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint, atomically and durably. Raises DiskError."""
    sink = io.BytesIO()
    torch.save(state, sink)
    write_file(out / CHECKPOINT, sink.getbuffer())


def load_checkpoint(out: Path) -> dict[str, Any] | None:
    """Return the last checkpoint, or None where there is none.

    `weights_only` admits tensors and plain values alone: nothing in the file is run. Raises CacheDamagedError.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CacheDamagedError(
            f"{path}: not a readable checkpoint ({' '.join(str(error).split())[:200]}); delete it to start anew"
        ) from error
    return state


class Clock:
    """Counts seconds, images and the time spent waiting for data, over all sessions of a run."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._before = 0.0
        self._waited = 0.0
        self._images = 0

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"seconds": self.seconds, "waited": self._waited, "images": self._images}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self._before = state["seconds"]
        self._waited = state["waited"]
        self._images = int(state["images"])

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches, counting the time that each took to come."""
        source = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(source, None)
            self._waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def count(self, images: int) -> None:
        """Add finished images."""
        self._images += images

    @property
    def seconds(self) -> float:
        """Seconds of work, earlier sessions up to their last checkpoint included."""
        return self._before + time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Images a second."""
        return self._images / max(self.seconds, 1e-9)

    @property
    def share(self) -> float:
        """Share of the time spent waiting for data."""
        return self._waited / max(self.seconds, 1e-9)

    def line(self) -> Json:
        """Return what of it goes to the metrics."""
        seconds = round(self.seconds, 2)
        rate = round(self.rate, 2)
        share = round(self.share, 4)
        return {"seconds": seconds, "images_per_second": rate, "wait_share": share}


class MetricsFile:
    """JSON lines, each with a `step`, mirrored to TensorBoard; lines past the checkpoint of a resume are dropped."""

    def __init__(self, out: Path, step: int) -> None:
        """Go on after `step`. Raises DiskError."""
        self._path = out / METRICS
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        write_file(self._path, "".join(f"{line}\n" for line in kept).encode())
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, line: Json) -> None:
        """Append one line. Raises DiskError."""
        with disk_errors(self._path), open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            self._board.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        """Hand everything to the disk; call it before a checkpoint that lies past these lines."""
        self._board.flush()

    def read(self) -> list[Json]:
        """Return all lines."""
        return [json.loads(line) for line in self._path.read_text().splitlines()]


class NoMetrics:
    """Where the lines of processes go that are not the first."""

    def write(self, line: Json) -> None:
        """Drop a line."""

    def flush(self) -> None:
        """Do nothing."""


def _step_of(line: str) -> float:
    """Return a line's step; a line that a kill cut short counts as past everything."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
