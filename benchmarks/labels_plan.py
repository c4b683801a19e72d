"""What an experiment of labels.py is, and its flags."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from experiment import add_results_flags, parsed
from records import ROOT, Results

AMOUNTS = ("--seeds", "--labelled", "--exact", "--finetunings")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One experiment."""

    name: str
    work: Path
    train: Path | None
    train_masks: Path | None
    test: Path | None
    test_masks: Path | None
    teacher: str | None
    timestep: int
    quality: str
    images: int
    test_images: int
    labelled: str
    seeds: int
    width: int
    fit_epochs: int
    student: str
    student_size: str | None
    fpn_width: int
    loss: str
    label_weight: float
    epochs: int
    batch_size: int
    finetune_epochs: int
    finetune_lr: float
    finetunings: int
    device: str
    exact: bool
    compile: bool
    results: Results


def asked_plan(about: str) -> tuple[Plan, bool]:
    """Return what the command line asks for, and whether it asks for tables alone."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--name", required=True, help="folder of the results")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "labels", help="images, caches and runs"
    )
    for path in ("train", "train-masks", "test", "test-masks"):
        parser.add_argument(
            f"--{path}", type=Path, help="all four of them, else scenes are generated"
        )
    parser.add_argument(
        "--teacher", help="a teacher of these images, else the bundled one of scenes"
    )
    parser.add_argument("--timestep", type=int, default=50)
    parser.add_argument("--quality", default="default", help="of the cache, as extract takes it")
    parser.add_argument(
        "--images", type=int, default=3000, help="unlabelled images, the labelled ones among them"
    )
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--labelled", default="20,40")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--width", type=int, default=256, help="of the interpreter")
    parser.add_argument("--fit-epochs", type=int, default=100)
    parser.add_argument("--student", default="resnet10t")
    parser.add_argument("--student-size")
    parser.add_argument("--fpn-width", type=int, default=64)
    parser.add_argument("--loss", default="mse", help="of features, as train takes it")
    parser.add_argument("--label-weight", type=float, default=1.0, help="of the mixed arm")
    parser.add_argument("--epochs", type=int, default=10, help="passes of distillation")
    parser.add_argument("--batch-size", type=int, default=32, help="of distillation")
    parser.add_argument(
        "--finetune-epochs", type=int, default=400, help="passes over the labelled images"
    )
    parser.add_argument(
        "--finetune-lr", type=float, default=3e-2, help="of the head; the backbone takes a tenth"
    )
    parser.add_argument(
        "--finetunings", type=int, default=1, help="of each start, by their order, crops and jitter"
    )
    parser.add_argument(
        "--exact", action="store_true", help="label distillation from nearly exact labels too"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile teacher, students and losses"
    )
    parser.add_argument("--device", default="auto")
    add_results_flags(parser)
    asked, table_only = parsed(parser, "labels.py", AMOUNTS)
    return Plan(**asked), table_only
