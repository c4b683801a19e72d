"""A student from a cache of CIFAR-10 against its own starting weights, every tap of its teacher,
and raw pixels.

    python benchmarks/cifar10.py --data ../shared/data [--work runs/cifar10] [--seeds 3] \
        [--results DIR] [--table]

Every run writes its own JSON to docs/results/cifar10/ and a finished run is skipped, so that the
work adds up over interruptions. The table is written to docs/results/cifar10.md from those files.
--results and --work with empty folders measure everything again except the teacher, which is in the
repository.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pages import write_lines
from records import ROOT, Results, results_flag, with_todays_names

TEACHER = ROOT / "benchmarks" / "teachers" / "cifar10"
HEAD = """# CIFAR-10

Written by `python benchmarks/cifar10.py --data DATA`; each run has its own JSON in the folder `cifar10`.
Machine: {machines}. Seconds are wall times of runs that shared the cores with each other and with other work.
The teacher (`benchmarks/teachers/cifar10`, [samples](../../benchmarks/teachers/cifar10/samples.png),
[loss](../../benchmarks/teachers/cifar10/loss.png)) is small: it was trained for about an hour on such a machine. The
question is how much of its quality students take over. Students train on strides 2, 4 and 8: half of the finest tap is
noise, and without that tap their input is 64 px instead of 128. All rows use the same 20,000 labelled training images
and the 10,000 test images. Students and random initialisations pool 512 values, each tap pools its channels, so a
student may score higher than any single tap that it learned from.
"""
TIMESTEPS = (20, 50, 100, 200)
TEACH = [
    "--size",
    "32",
    "--channels",
    "32,96,128,128",
    "--weights",
    "fp16",
    "--steps",
    "3000",
    "--compile",
]
EXTRACT = ["--limit", "20000"]
# Without the finest tap, which is mostly noise, students enter at 64 px instead of 128 and are four
# times as fast.
TRAIN = [
    "--student",
    "resnet18",
    "--taps",
    "2,4,8",
    "--fpn-width",
    "64",
    "--epochs",
    "8",
    "--batch-size",
    "64",
]
EVALUATE = ["--limit-train", "20000", "--batch-size", "256"]


def main() -> None:
    """Run what is not finished, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with cifar10-{train,test}.parquet"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "cifar10", help="caches and runs"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="runs at the same time"
    )
    parser.add_argument(
        "--table", action="store_true", help="only write the table, from the recorded results"
    )
    results_flag(parser)
    asked = parser.parse_args()
    folder = asked.results / "cifar10"
    if not asked.table:
        run_all(folder, asked.data, asked.work, asked.seeds, asked.workers)
    write_table(folder)


def run_all(folder: Path, data: Path, work: Path, seeds: int, workers: int) -> None:
    """Train the teacher, choose the timestep, extract; then run students and probes in parallel."""
    step = partial(run_step, folder)
    train = data / "cifar10-train.parquet"
    test = data / "cifar10-test.parquet"
    probes = ["--train", train, "--test", test, *EVALUATE]
    step("teacher", ["teacher", "train", train, *TEACH, "--out", TEACHER])
    levels = [flag for t in TIMESTEPS for flag in ("--timestep", t)]
    small = work / "timesteps.cache"
    step(
        "timesteps-extract",
        ["extract", train, "--teacher", TEACHER, "--limit", 512, *levels, "--out", small],
    )
    held_out = ["--train", train, "--limit-train", 4000, "--limit-test", 1000]
    chosen = step("timesteps", ["evaluate", small, "--teacher", TEACHER, *held_out])
    timestep = int(chosen["best"].split("/")[0].removeprefix("t"))
    cache = work / "cache"
    step(
        "extract",
        ["extract", train, "--teacher", TEACHER, "--timestep", timestep, *EXTRACT, "--out", cache],
    )
    step("inspect", ["inspect", cache])

    def seed_steps(seed: int) -> None:
        run = work / f"seed{seed}"
        step(
            f"train-{seed}",
            ["train", cache, *TRAIN, "--seed", seed, "--out", run],
            run / "summary.json",
            workers,
        )
        step(f"student-{seed}", ["evaluate", run / "backbone", *probes], threads_of=workers)
        step(f"init-{seed}", ["evaluate", run / "init", *probes], threads_of=workers)

    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(seed_steps, seed) for seed in range(seeds)]
        jobs.append(
            pool.submit(
                step, "taps", ["evaluate", cache, "--teacher", TEACHER, *probes], None, workers
            )
        )
        jobs.append(pool.submit(step, "pixels", ["evaluate", "pixels", *probes], None, workers))
        for job in jobs:
            job.result()


def run_step(
    folder: Path, name: str, arguments: list[Any], summary: Path | None = None, threads_of: int = 1
) -> dict[str, Any]:
    """Run one command unless its result is there and return the result; it uses an equal share of
    the threads.
    """
    words = [str(a) for a in arguments]
    as_json = ["--json"] if words[0] in ("evaluate", "inspect") else []
    shown = " ".join(["dtcache", *words]).replace(str(ROOT) + "/", "")

    def run() -> dict[str, Any]:
        print(shown, file=sys.stderr, flush=True)
        threads = str(max(1, (os.cpu_count() or 1) // threads_of))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
        command = [sys.executable, str(ROOT / "cli.py"), *words, *as_json]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=environment
        )
        return (
            json.loads(summary.read_text() if summary else done.stdout)
            if summary or as_json
            else {}
        )

    return Results(folder=folder, command=shown).once(name, run)


def write_table(folder: Path) -> None:
    """Write the page beside a folder from the results that are in it."""
    records = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    rows = ["| features | dims | k-NN top-1 % | linear top-1 % |", "|---|---|---|---|"]
    for kind, title in (
        ("init", "ResNet-18, its own starting weights"),
        ("student", "**ResNet-18, from the cache**"),
    ):
        runs = [r["result"] for n, r in records.items() if n.startswith(f"{kind}-")]
        if runs:
            spread = (
                f"{mean_and_spread([r[k] for r in runs])}" for k in ("knn_top1", "linear_top1")
            )
            rows.append(
                f"| {title}, {len(runs)} seeds | {runs[0]['feature_dim']} | {' | '.join(spread)} |"
            )
    for name in ("taps", "pixels"):
        for row in records.get(name, {"result": {"rows": []}})["result"]["rows"]:
            title = f"teacher {row['name']}" if name == "taps" else "raw pixels"
            rows.append(
                f"| {title} | {row['feature_dim']} | {row['knn_top1']:.2f} | "
                f"{row['linear_top1']:.2f} |"
            )
    commands = [
        f"{with_todays_names(r['command'])}    # {r['seconds']:.0f} s, commit {r['commit']}"
        for r in records.values()
    ]
    head = HEAD.format(machines="; ".join(sorted({r["machine"] for r in records.values()})))
    text = [
        head,
        "## Table",
        "",
        *rows,
        "",
        *gap(records),
        *choice(records),
        *cache(records),
        *losses(records, folder),
    ]
    text += ["## Commands", "", "```", *commands, "```", ""]
    write_lines(folder.parent / "cifar10.md", text)


def choice(records: dict[str, Any]) -> list[str]:
    """Return the table of probes from which the timestep was chosen."""
    if "timesteps" not in records:
        return []
    result = records["timesteps"]["result"]
    found = {row["name"]: row["linear_top1"] for row in result["rows"] if "/" in row["name"]}
    taps = list(dict.fromkeys(name.split("/")[1] for name in found))
    rows = [
        f"| {t} | " + " | ".join(f"{found[f't{t}/{tap}']:.1f}" for tap in taps) + " |"
        for t in TIMESTEPS
    ]
    head = [f"| T | {' | '.join(taps)} |", "|---" * (len(taps) + 1) + "|"]
    return [
        "## The timestep",
        "",
        f"Chosen by the teacher's own linear probe on training images alone ({result['num_train']} "
        f"to fit, "
        f"{result['num_test']} held out): {result['best']}.",
        "",
        *head,
        *rows,
        "",
    ]


def cache(records: dict[str, Any]) -> list[str]:
    """Return the table of the cache's taps and its size."""
    if "inspect" not in records:
        return []
    report = records["inspect"]["result"]
    rows = [
        "| tap | shape | bits per value | noise share | lost share of the image-determined signal |",
        "|---|---|---|---|---|",
    ]
    for tap in report["taps"]:
        shape = f"{tap['channels']} x {tap['height']} x {tap['width']}"
        shares = f"{tap['noise_share']:.0%} | {tap['determined_error']:.0%}"
        rows.append(f"| {tap['name']} | {shape} | {tap['bits_per_value']:.3f} | {shares} |")
    return [
        "## The cache",
        "",
        f"{report['num_done']} images, both flips: {report['bytes_per_image']:.0f} bytes per image, "
        f"{report['ratio']:.1f} times smaller than fp16 ({report['fp16_bytes_per_image']} bytes), "
        f"which is everything on "
        f"disk except the stored images (the source's own JPEG files, "
        f"{report['image_bytes'] / report['num_done']:.0f} bytes each).",
        "",
        *rows,
        "",
    ]


def losses(records: dict[str, Any], folder: Path) -> list[str]:
    """Return the students' final losses on held-out images of the cache."""
    runs = [r["result"] for name, r in records.items() if name.startswith("train-")]
    if not runs:
        return []
    rows = ["| held out, last epoch | mean of the seeds | noise floor |", "|---|---|---|"]
    for name in [n for n in runs[0]["held_out"] if n.startswith("mse/")]:
        mean = mean_and_spread([run["held_out"][name] for run in runs])
        rows.append(
            f"| {name} | {mean} | {runs[0]['noise_floor'][name.removeprefix('mse/')]:.3f} |"
        )
    curves = ["![held-out losses of seed 0](cifar10/curves-seed0.png)", ""]
    return ["## Losses", "", *rows, "", *(curves if (folder / "curves-seed0.png").exists() else [])]


def gap(records: dict[str, Any]) -> list[str]:
    """Return which part of the gap between random weights and the best tap the students close."""
    seeds = [n.removeprefix("student-") for n in records if n.startswith("student-")]
    if not seeds or "taps" not in records:
        return []
    best = records["taps"]["result"]["linear_top1"]
    pairs = [
        (
            records[f"init-{s}"]["result"]["linear_top1"],
            records[f"student-{s}"]["result"]["linear_top1"],
        )
        for s in seeds
    ]
    closed = [100 * (student - init) / (best - init) for init, student in pairs]
    gained = [student - init for init, student in pairs]
    return [
        f"The best single tap is {records['taps']['result']['best']} with {best:.2f} %. The "
        f"students close "
        f"{mean_and_spread(closed)} % of the gap between their own starting weights and it (linear "
        f"probe), and are "
        f"{mean_and_spread(gained)} points above those weights.",
        "",
    ]


def mean_and_spread(values: list[float]) -> str:
    """Return the mean and, if there are several values, their standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
