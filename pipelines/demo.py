"""`dtcache demo`: every stage, offline, on generated scenes with the bundled teacher."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path

from rich.table import Table

from dtcache.atomic_files import write_file
from dtcache.cache.selection import num_held_out
from dtcache.device import resolve_compute
from dtcache.errors import ConfigError
from dtcache.options import DemoOptions, EvaluateOptions, ExtractOptions, TrainOptions
from dtcache.options.demo import TEST_START
from dtcache.recipe import Json
from dtcache.store.summary import inspect_cache
from dtcache.student.timm_backbone import require_known
from pipelines.evaluate.classification import classify
from pipelines.extract.extract import extract
from pipelines.inspect.tables import render
from pipelines.runs.folder import claim_run
from pipelines.terminal.console import show
from pipelines.terminal.progress import track
from pipelines.train.train import train
from pipelines.write_scenes import write_scenes

SCENE_SIZE = 64


def demo(out: Path, options: DemoOptions) -> Json:
    """Run every stage that is not finished in `out`; return and write `summary.json`.

    Raises CacheMismatchError if `out` holds a demonstration with other options, and ConfigError,
    before anything is written, if the device or a student is unknown, or if the training images
    that are not held out do not fill a batch.
    """
    trained_on = options.train_images - num_held_out(options.train_images)
    if options.train_images < 4 or trained_on < options.batch_size:
        raise ConfigError(
            f"`train_images` {options.train_images}: {trained_on} of them are not held out; "
            f"expected at least 4 images and a full batch of {options.batch_size} that are not; "
            "pass more `train_images`, or a smaller `batch_size`"
        )
    resolve_compute(options.device, options.precision)
    names = options.students.split(",")
    for name in names:
        require_known(name)
    claim_run(out, asdict(options), volatile=("device",))
    stages = Stages(out)
    stages.run("scenes", partial(_write_scenes, out, options))
    stages.run("extract", partial(_extract, out, options))
    report = inspect_cache(out / "cache")
    show(render(report, out / "cache"), to_stderr=True)
    for name in names:
        stages.run(f"train {name}", partial(_train, out, name, options))
    kinds = {"random init": "init", "from the cache": "backbone"}
    models = {
        f"{name}, {kind}": out / name / folder for name in names for kind, folder in kinds.items()
    }
    students = [
        stages.run(f"evaluate {name}", partial(_evaluate, out, name, model, options))
        for name, model in models.items()
    ]
    summary = {
        "bytes_per_image": report["bytes_per_image"],
        "fp16_bytes_per_image": report["fp16_bytes_per_image"],
        "ratio": report["ratio"],
        "stored_image_bytes_per_image": report["image_bytes"] / report["num_done"],
        "num_images": report["num_done"],
        "seconds": stages.spent("seconds"),
        "cpu_seconds": stages.spent("cpu_seconds"),
        "students": students,
    }
    write_file(out / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


class Stages:
    """Runs each named stage once; `stages.json` of the folder holds results and durations."""

    def __init__(self, out: Path) -> None:
        self._path = out / "stages.json"
        self._done: dict[str, Json] = (
            json.loads(self._path.read_text("utf-8")) if self._path.exists() else {}
        )

    def run(self, name: str, work: Callable[[], Json]) -> Json:
        """Return the stage's result; run it if it has not finished before."""
        if name not in self._done:
            started = time.monotonic()
            cpu_started = time.process_time()
            result = work()
            self._done[name] = {
                "seconds": round(time.monotonic() - started, 1),
                "cpu_seconds": round(time.process_time() - cpu_started, 1),
                "result": result,
            }
            write_file(self._path, json.dumps(self._done, indent=1).encode())
        result = self._done[name]["result"]
        return dict(result)

    def spent(self, kind: str) -> dict[str, float]:
        """Return what each finished stage took, by name; `kind` is seconds or cpu_seconds."""
        return {name: stage[kind] for name, stage in self._done.items()}


def _write_scenes(out: Path, options: DemoOptions) -> Json:
    splits = {"train": (0, options.train_images), "test": (TEST_START, options.test_images)}
    with track("scenes", options.train_images + options.test_images) as progress:
        for split, (start, count) in splits.items():
            write_scenes(
                out / "scenes" / split,
                seed=options.seed,
                size=SCENE_SIZE,
                count=count,
                start=start,
                on_progress=progress.advance,
            )
    return {}


def _extract(out: Path, options: DemoOptions) -> Json:
    with as_file(files("dtcache") / "assets" / "scenes-teacher") as teacher:
        extract(
            out / "scenes" / "train" / "images",
            out / "cache",
            ExtractOptions(
                teacher=str(teacher),
                timestep=(options.timestep,),
                seed=options.seed,
                device=options.device,
                precision=options.precision,
            ),
        )
    return {}


def _train(out: Path, name: str, options: DemoOptions) -> Json:
    chosen = TrainOptions(
        student=name,
        epochs=options.epochs,
        warmup_epochs=min(1.0, options.epochs / 2),
        batch_size=options.batch_size,
        fpn_width=options.fpn_width,
        seed=options.seed,
        device=options.device,
        precision=options.precision,
    )
    trained = train([out / "cache"], out / name, chosen)
    return {"held_out_loss": trained.held_out_loss}


def _evaluate(out: Path, name: str, model: Path, options: DemoOptions) -> Json:
    images = out / "scenes"
    chosen = EvaluateOptions(
        train=images / "train" / "images",
        test=images / "test" / "images",
        seed=options.seed,
        device=options.device,
        precision=options.precision,
    )
    (row,) = classify(str(model), chosen).rows
    return {"name": name, "knn_top1": row.knn_top1, "linear_top1": row.linear_top1}


def cost_of(summary: Json) -> str:
    """Return a sentence on bytes per image: features with codec and indices, and stored images."""
    return (
        f"{summary['num_images']} images: features take {summary['bytes_per_image']:.0f} bytes per "
        f"image for both flips, {summary['ratio']:.0f} times less than fp16 "
        f"({summary['fp16_bytes_per_image']}); stored images take "
        f"{summary['stored_image_bytes_per_image']:.0f} bytes more"
    )


def render_demo(summary: Json) -> Table:
    """Return the summary as a table, one row per student before and after training."""
    table = Table(title=cost_of(summary))
    for column in ("student", "k-NN top-1 %", "linear top-1 %", "seconds"):
        table.add_column(column, justify="left" if column == "student" else "right")
    seconds = summary["seconds"]
    for student in summary["students"]:
        name = student["name"].split(",")[0]
        trained = seconds[f"train {name}"] if "cache" in student["name"] else 0.0
        table.add_row(
            student["name"],
            f"{student['knn_top1']:.1f}",
            f"{student['linear_top1']:.1f}",
            f"{trained:.0f}",
        )
    rest = ", ".join(
        f"{name} {value:.0f} s" for name, value in seconds.items() if not name.startswith("train")
    )
    cpu_seconds = sum(summary["cpu_seconds"].values())
    table.caption = f"{rest}; {sum(seconds.values()):.0f} s, {cpu_seconds:.0f} CPU s in total"
    return table
