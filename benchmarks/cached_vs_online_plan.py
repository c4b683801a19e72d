"""What cached_vs_online.py compares: the plan of one experiment, and the options that its parts
share.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiment import Experiment, experiment_flags, parsed
from records import ROOT

from dtcache.images import open_source
from dtcache.options import ExtractOptions, TrainOptions
from dtcache.rng import permuted
from dtcache.student import Student, build_student

AMOUNTS = ("--seeds", "--parts", "--large", "--rounds", "--steps")


@dataclass(frozen=True, kw_only=True)
class Plan(Experiment):
    """The experiment and the settings of its speed measurement."""

    parts: str
    large: str
    rounds: int
    steps: int
    scenes: int
    compile: bool


def parse(about: str) -> tuple[Plan, bool]:
    """Return the plan and whether only the tables are asked for."""
    parser = experiment_flags(
        about, work=ROOT / "runs" / "cached_vs_online", images=2000, epochs=60
    )
    parser.add_argument("--parts", default="speed,quality,noise,whitening")
    parser.add_argument(
        "--large",
        default="resnet50",
        help="the second student whose speed and waiting are measured",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed blocks per arm of the speed part"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps per block")
    parser.add_argument(
        "--scenes", type=int, default=300, help="images per split of the segmentation"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile teacher, student and losses"
    )
    asked, table_only = parsed(parser, "cached_vs_online.py", AMOUNTS)
    return Plan(**asked), table_only


def subset(plan: Plan) -> Path:
    """Write the training images as files of their own, so that every seed, online or cached, has
    the same ones.
    """
    source = open_source(plan.train)
    out = plan.work / f"images-{plan.images}"
    out.mkdir(parents=True, exist_ok=True)
    for index in permuted(len(source.keys), seed=0, stream="subset")[: plan.images].tolist():
        path = out / f"{index:08d}.png"
        if not path.exists():
            path.write_bytes(source.read(index))
    return out


def extraction(plan: Plan, **chosen: Any) -> ExtractOptions:
    """Return the options that extractions share, and some of their own."""
    common = ExtractOptions(
        teacher=plan.teacher,
        timestep=(plan.timestep,),
        batch_size=64,
        device=plan.device,
        compile=plan.compile,
    )
    return replace(common, **chosen)


def training(plan: Plan, seed: int, **chosen: Any) -> TrainOptions:
    """Return the options that trainings share, and some of their own."""
    return replace(plan.training(seed), compile=plan.compile, **chosen)


def online(plan: Plan) -> dict[str, Any]:
    """Return the training options that run the teacher in the training loop."""
    return {"teacher": plan.teacher, "timestep": plan.timestep}


def new_student(
    plan: Plan, name: str, shapes: dict[str, tuple[int, int, int]], like: Any
) -> Student:
    """Return an untrained student of a plan."""
    size = (plan.student_size, plan.student_size)
    return build_student(
        name, shapes, like.view, size=size, width=plan.fpn_width, init=None, seed=0
    )
