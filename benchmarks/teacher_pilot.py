"""Compare teachers trained for the same CPU time: widths, Min-SNR weighting, early timesteps only.

    python benchmarks/teacher_pilot.py --data DATA --work WORK [--seconds 720]

Every arm trains for the same CPU time on one core. The script first measures the CPU seconds per
step and then fixes the number of steps of each arm, because the learning-rate schedule depends on
it. The linear probe of `dtcache teacher show --probe` scores each block of the decoder. Results:
WORK/<arm>.json. The script skips arms with a result, so the same command resumes.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from dtcache.options import TeacherShowOptions
from dtcache.recipe import Json
from pipelines.probe_teacher import probe_teacher

ARMS = {
    "plain": (),
    "wide": ("--channels", "64,96,128,128"),
    "snr5": ("--snr-gamma", "5"),
    "early": ("--max-timestep", "400"),
}
"""Flags of `dtcache teacher train` by arm."""
NARROW = "32,96,128,128"
TIMESTEPS = (20, 50)
BATCH = 32


def teach(data: Path, out: Path, flags: tuple[str, ...], steps: int) -> float:
    """Run `dtcache teacher train` and return the CPU seconds that it took."""
    channels = () if "--channels" in flags else ("--channels", NARROW)
    command = [
        sys.executable,
        "-m",
        "cli",
        "teacher",
        "train",
        str(data / "cifar10-train.parquet"),
        "--size",
        "32",
        *channels,
    ]
    command += [*flags, "--weights", "fp16", "--precision", "bf16", "--compile", "--samples", "16"]
    command += [
        "--steps",
        str(steps),
        "--batch-size",
        str(BATCH),
        "--warmup",
        "50",
        "--out",
        str(out),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def probe(teacher: Path, data: Path, count: int) -> Json:
    """Probe a teacher as `dtcache teacher show --probe` does, on `count` images of each split."""
    options = TeacherShowOptions(
        probe=data / "cifar10-train.parquet",
        test=data / "cifar10-test.parquet",
        timestep=TIMESTEPS,
        limit=count,
        device="cpu",
    )
    return probe_teacher(str(teacher), options).to_json()


def main() -> None:
    """Train and probe every arm that has no result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with cifar10-train.parquet and -test"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of teachers and results")
    parser.add_argument(
        "--seconds", type=float, default=720, help="CPU seconds of training per arm [720]"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        help="training images and test images of the probe [2000]",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    speed_file = args.work / "seconds_per_step.json"
    seconds = json.loads(speed_file.read_text()) if speed_file.exists() else {}
    for name in ("plain", "wide"):
        if name not in seconds:
            # The first run fills the compiler's cache, so that compilation is not timed.
            teach(args.data, args.work / f"speed-{name}-1", ARMS[name], 1)
            short = teach(args.data, args.work / f"speed-{name}-2", ARMS[name], 2)
            long = teach(args.data, args.work / f"speed-{name}-22", ARMS[name], 22)
            seconds[name] = (long - short) / 20
            speed_file.write_text(json.dumps(seconds))
    for name, flags in ARMS.items():
        result = args.work / f"{name}.json"
        if result.exists():
            continue
        steps = round(args.seconds / seconds["wide" if name == "wide" else "plain"])
        cpu = teach(args.data, args.work / name, flags, steps)
        probe_started = time.process_time()
        scores = probe(args.work / name, args.data, args.images)
        record = {
            "steps": steps,
            "batch": BATCH,
            "flags": flags,
            "cpu_seconds": cpu,
            "probe": scores,
            "probe_cpu_seconds": time.process_time() - probe_started,
        }
        result.write_text(json.dumps(record, indent=1))
        print(
            name,
            steps,
            f"{cpu:.0f} s",
            {f"t{s['timestep']}/{s['name']}": s["linear_top1"] for s in scores["scores"]},
            flush=True,
        )


if __name__ == "__main__":
    main()
