"""What every resumable run folder has: its options, its checkpoint, its metrics."""

import json
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.tensorboard import SummaryWriter

from dtcache.errors import CacheDamagedError, CacheMismatchError
from dtcache.spec import Json
from dtcache.storage import write_file

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"

T = TypeVar("T")


def claim_run(out: Path, wanted: Json, volatile: Collection[str]) -> None:
    """Record in `out/run.json` what the run is; fields named `volatile` may differ when it is resumed.

    Raises CacheMismatchError where the folder holds a run of other options, naming the field.
    """
    path = out / "run.json"
    out.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(wanted, default=str))
    if path.exists():
        found = json.loads(path.read_text())
        for name, value in wanted.items():
            if name not in volatile and found.get(name) != value:
                raise CacheMismatchError(
                    f"{out} holds a run with another {name}: {found.get(name)!r} there, {value!r} was asked for; "
                    "give the same options to resume it, or another --out"
                )
    elif (out / CHECKPOINT).exists():
        raise CacheMismatchError(f"{out} holds a checkpoint but no run.json; give another --out")
    else:
        write_file(path, json.dumps(wanted, indent=1).encode())


def save_checkpoint(out: Path, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint, atomically."""
    temporary = out / f".tmp-{CHECKPOINT}"
    torch.save(state, temporary)
    temporary.replace(out / CHECKPOINT)


def load_checkpoint(out: Path) -> dict[str, Any] | None:
    """Return the last checkpoint (tensors and plain values only; nothing in it is run), or None where there is none."""
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CacheDamagedError(
            f"{path}: not a readable checkpoint ({error}); delete it to start the run anew"
        ) from error
    return state


class Clock:
    """Counts images and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self._start, self._waited, self._images = time.monotonic(), 0.0, 0

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
        """Seconds since the start."""
        return time.monotonic() - self._start

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
        return {
            "seconds": round(self.seconds, 2),
            "images_per_second": round(self.rate, 2),
            "wait_share": round(self.share, 4),
        }


class MetricsFile:
    """JSON lines, each with a `step`, mirrored to TensorBoard; lines past the checkpoint of a resume are dropped."""

    def __init__(self, out: Path, step: int) -> None:
        self._path = out / METRICS
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        self._path.write_text("".join(f"{line}\n" for line in kept))
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, line: Json) -> None:
        """Append one line."""
        for name, value in line.items():
            self._board.add_scalar(name, value, line["step"])
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[Json]:
        """Return all lines."""
        return [json.loads(line) for line in self._path.read_text().splitlines()]


def _step_of(line: str) -> float:
    """Return a line's step; a line that a kill cut short counts as past everything."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
