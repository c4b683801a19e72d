"""What label distillation is worth: one segmentation network, finetuned on a few images, from five
starts.

    python benchmarks/labels.py --name scenes \
        [--images 3000 --labelled 20,40 --seeds 5 --exact --compile ...] \
        [--results DIR] [--table]
    python benchmarks/labels.py --name camvid --train IMAGES --train-masks DIR \
        --test IMAGES --test-masks DIR \
        --teacher DIR --timestep T --labelled 40 --seeds 3 [--results DIR] [--table]

Without paths it generates scenes and takes the bundled teacher. Of a seed all arms share the
labelled images, the network (backbone, pyramid, logit head), its starting weights where they are
random, and the recipe with crops and jitter: they differ in what the backbone, and in the label and
mixed arms the head too, was trained on before. The interpreter is judged on the teacher's features
of the test images; students of labels, not yet finetuned, by their own head too. Of several
finetunings of a start the mean counts. Every result is a JSON of its own, and a finished one is
skipped. The tables go to docs/results/labels.md. --results and --work with empty folders measure
everything anew; results that other flags made are refused, so that another --loss, --label-weight
or recipe needs another --name.
--quality applies to both caches: it changes the interpreter's input and the size that the labels'
bytes are compared with.
--finetune-lr and --finetune-epochs were chosen for the random start, by its test mIoU.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from labels_measures import held_out, interpreter_miou, own_miou
from labels_plan import Plan, asked_plan
from labels_tables import write_tables

from dtcache.cache.cache import Cache
from dtcache.images import open_masks
from dtcache.images.scenes import write_scenes
from dtcache.options import (
    EvaluateOptions,
    ExtractOptions,
    LabelFitOptions,
    LabelWriteOptions,
    TrainOptions,
)
from dtcache.rng import permuted
from dtcache.store.summary import inspect_cache
from dtcache.student import load_backbone, probe_maps
from dtcache.student.logit_head import LogitHead, load_head, save_head
from pipelines.evaluate.segmentation import segment
from pipelines.extract.extract import extract
from pipelines.label.fit_interpreter import fit_interpreter
from pipelines.label.write_labels import write_labels
from pipelines.train.train import train

TEST_START = 1_000_000
FINETUNING_SEEDS = 1000


def main() -> None:
    """Run what is not finished, then write the tables."""
    plan, table_only = asked_plan(__doc__.splitlines()[0])
    if not table_only:
        run_all(plan if plan.train is not None else scenes(plan))
    write_tables(plan.results)


def scenes(plan: Plan) -> Plan:
    """Generate scenes and return the plan that uses them."""
    for split, start, count in (("train", 0, plan.images), ("test", TEST_START, plan.test_images)):
        write_scenes(plan.work / split, seed=0, size=64, count=count, start=start)
    return replace(
        plan,
        train=plan.work / "train/images",
        train_masks=plan.work / "train/masks",
        test=plan.work / "test/images",
        test_masks=plan.work / "test/masks",
    )


@contextmanager
def teacher(plan: Plan) -> Iterator[str]:
    """Yield the directory of the teacher."""
    if plan.teacher is not None:
        yield plan.teacher
        return
    with as_file(files("dtcache") / "assets" / "scenes-teacher") as bundled:
        yield str(bundled)


def run_all(plan: Plan) -> None:
    """Cache once; then, seed by seed so that pairs grow, fit, write, distil and finetune."""
    assert plan.train is not None and plan.test is not None
    with teacher(plan) as where:
        for split, images, limit in (
            ("cache", plan.train, plan.images),
            ("test-cache", plan.test, None),
        ):
            extract(
                images,
                plan.work / split,
                ExtractOptions(
                    teacher=where,
                    timestep=(plan.timestep,),
                    quality=plan.quality,
                    limit=limit,
                    device=plan.device,
                    compile=plan.compile,
                ),
            )
    report = inspect_cache(plan.work / "cache")
    plan.results.once(
        "cache",
        lambda: {name: report[name] for name in ("num_done", "bytes_per_image", "ratio", "parts")},
    )
    for seed in range(plan.seeds):
        for count in map(int, plan.labelled.split(",")):
            run_one(plan, count, seed)
            write_tables(plan.results)


def run_one(plan: Plan, count: int, seed: int) -> None:
    """Run all arms of one labelled subset and one seed."""
    masks = subset(plan, count, seed)
    name = f"n{count}-seed{seed}"
    once = plan.results.once
    interpreter = plan.work / "interpreters" / name
    if not interpreter.exists():
        fit_interpreter(
            plan.work / "cache",
            interpreter,
            LabelFitOptions(
                masks=masks,
                images=plan.train,
                validation=0.0,
                width=plan.width,
                epochs=plan.fit_epochs,
                warmup_epochs=plan.fit_epochs // 5,
                seed=seed,
                device=plan.device,
            ),
        )
    once(
        f"{name}-interpreter",
        lambda: interpreter_miou(interpreter, plan.work / "test-cache", tested(plan, masks)),
    )
    once(f"{name}-labels", lambda: written(plan, interpreter, name, 0.1))
    if plan.exact:
        once(f"{name}-labels-exact", lambda: written(plan, interpreter, f"{name}-exact", 1.0))
    runs = students(plan, name, seed)
    for arm, run in runs.items():
        once(f"{name}-{arm}-held-out", lambda run=run: held_out(run))
        if (run / "head").is_dir():
            once(f"{name}-{arm}-own", lambda run=run: own_miou(run, tested(plan, masks)))
    for number in range(plan.finetunings):
        finetune(plan, name, masks, runs, seed, number)


def students(plan: Plan, name: str, seed: int) -> dict[str, Path]:
    """Distil the student of each arm, unless that is done, and return their runs."""
    runs = {
        "feature": distilled(plan, f"feature-{plan.loss}-seed{seed}", seed, loss=plan.loss),
        "label": distilled(plan, f"label-{name}", seed, labels=name, feature_weight=0.0),
        "mixed": distilled(
            plan,
            f"mixed-{plan.loss}-{plan.label_weight:g}-{name}",
            seed,
            labels=name,
            loss=plan.loss,
            label_weight=plan.label_weight,
        ),
    }
    if plan.exact:
        runs["label-exact"] = distilled(
            plan, f"label-exact-{name}", seed, labels=f"{name}-exact", feature_weight=0.0
        )
    return runs


def finetune(
    plan: Plan, name: str, masks: Path, runs: dict[str, Path], seed: int, number: int
) -> None:
    """Finetune every start once, with its own seed for order, crops and jitter."""
    untrained = random_head(plan, runs["label"], seed)
    starts = {
        "random": (runs["feature"] / "init", untrained),
        "feature": (runs["feature"] / "backbone", untrained),
    }
    starts |= {arm: (run / "backbone", run) for arm, run in runs.items() if (run / "head").is_dir()}
    for arm, (backbone, head) in starts.items():
        options = replace(
            tested(plan, masks), head=str(head), seed=seed + FINETUNING_SEEDS * number
        )
        result = f"{name}-{arm}" + (f"-finetuning{number}" if number else "")
        plan.results.once(
            result, lambda backbone=backbone, options=options: finetuned(backbone, options)
        )


def subset(plan: Plan, count: int, seed: int) -> Path:
    """Return a folder with the masks of `count` cached images, chosen by the seed; larger subsets
    hold the smaller.
    """
    assert plan.train_masks is not None
    out = plan.work / "masks" / f"n{count}-seed{seed}"
    whole = open_masks(plan.train_masks)
    keys = sorted(
        key for key in Cache(plan.work / "cache").samples["key"].to_pylist() if whole.has(key)
    )
    for place in permuted(len(keys), seed=seed, stream="labelled")[:count].tolist():
        target = out / whole.path(keys[place]).relative_to(whole.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(whole.path(keys[place]), target)
    shutil.copyfile(whole.root / "classes.toml", out / "classes.toml")
    return out


def written(plan: Plan, interpreter: Path, name: str, share: float) -> dict[str, Any]:
    """Write a label set and return what it costs and how exact it is."""
    assert plan.train_masks is not None
    options = LabelWriteOptions(
        name=name, share=share, masks=plan.train_masks, images=plan.train, device=plan.device
    )
    done = write_labels(plan.work / "cache", interpreter, options)
    return {"share": done.share, **done.measured}


def distilled(plan: Plan, name: str, seed: int, **chosen: Any) -> Path:
    """Train a student, unless that is done, and return its run."""
    out = plan.work / "runs" / name
    train(
        plan.work / "cache",
        out,
        TrainOptions(
            student=plan.student,
            student_size=plan.student_size,
            fpn_width=plan.fpn_width,
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            seed=seed,
            device=plan.device,
            compile=plan.compile,
            at_weight=10.0 if chosen.get("loss") == "mse+at" else None,
            **chosen,
        ),
    )
    return out


def tested(plan: Plan, masks: Path) -> EvaluateOptions:
    """Return the recipe of finetuning on the labelled images, and the test images."""
    assert plan.train is not None
    return EvaluateOptions(
        task="segmentation",
        train=plan.train,
        train_masks=masks,
        test=plan.test,
        test_masks=plan.test_masks,
        finetune=True,
        epochs=plan.finetune_epochs,
        lr=plan.finetune_lr,
        device=plan.device,
    )


def finetuned(backbone: Path, options: EvaluateOptions) -> dict[str, Any]:
    """Finetune a network and return its test scores, per cent."""
    found = segment(str(backbone), options)
    return {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy, "iou_per_class": found.iou}


def random_head(plan: Plan, run: Path, seed: int) -> Path:
    """Write an untrained head of the same architecture as a run's."""
    network, size, _ = load_backbone(run / "backbone")
    _, spec = load_head(run / "head", probe_maps(network, size), size)
    folder = plan.work / "heads" / f"seed{seed}"
    torch.manual_seed(seed)
    save_head(LogitHead(spec), spec, folder)
    return folder


if __name__ == "__main__":
    main()
