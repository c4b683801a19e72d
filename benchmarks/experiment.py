"""What the experiments on students share: their inputs, their student, and the flags and command
that say so.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import Results, command_of, results_flag

from dtcache.options import TrainOptions

INPUTS = ("train", "test", "train_masks", "test_masks", "teacher")
"""What recorded commands show by name alone."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment; its name keeps the results of different ones apart."""

    train: Path
    test: Path
    teacher: str
    timestep: int
    work: Path
    name: str
    images: int
    held_out: int
    probe_images: int
    student: str
    student_size: int
    fpn_width: int
    epochs: int
    batch_size: int
    seeds: int
    device: str
    results: Results

    def training(self, seed: int) -> TrainOptions:
        """Return the options that all of its students share."""
        return TrainOptions(
            student=self.student,
            student_size=str(self.student_size),
            fpn_width=self.fpn_width,
            loss="mse+at",
            at_weight=10.0,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
            device=self.device,
        )


def experiment_flags(
    about: str, *, work: Path, images: int, epochs: int
) -> argparse.ArgumentParser:
    """Return a parser of an experiment's flags, with defaults for a narrow student on two cores."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--train", type=Path, required=True, help="images to train on")
    parser.add_argument("--test", type=Path, required=True, help="images that no arm trains on")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--timestep", type=int, required=True)
    parser.add_argument("--work", type=Path, default=work, help="caches and runs")
    parser.add_argument("--name", default="cifar10-narrow", help="folder of the results")
    parser.add_argument("--images", type=int, default=images)
    parser.add_argument("--held-out", type=int, default=1000, help="test images of the reference")
    parser.add_argument(
        "--probe-images", type=int, default=10_000, help="training images of the linear probe"
    )
    parser.add_argument("--student", default="resnet10t")
    parser.add_argument("--student-size", type=int, default=64)
    parser.add_argument("--fpn-width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    add_results_flags(parser)
    return parser


def add_results_flags(parser: argparse.ArgumentParser) -> None:
    """Add what experiments can do with results."""
    results_flag(parser)
    parser.add_argument(
        "--table", action="store_true", help="write the tables from the results that are there"
    )


def parsed(
    parser: argparse.ArgumentParser, script: str, amounts: tuple[str, ...]
) -> tuple[dict[str, Any], bool]:
    """Return what is asked for, its results found to be of this very command, and whether only
    tables are wanted.
    """
    asked = vars(parser.parse_args())
    table_only = asked.pop("table")
    where = asked.pop("results")
    shown = {name: value for name, value in asked.items() if name != "work"}
    results = Results(
        folder=where / Path(script).stem / asked["name"],
        command=command_of(script, shown, INPUTS),
        defaults=command_of(script, {name: parser.get_default(name) for name in shown}, INPUTS),
        amounts=("--name", *amounts),
    )
    results.read()
    return {**asked, "results": results}, table_only
