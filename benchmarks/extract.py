"""Compare the rate of `dtcache extract` with the teacher's forward pass and with a common script.

    python benchmarks/extract.py [--width 64] [--images 64] [--rounds 3] \
        [--device cuda --width 256 --batch-size 64]

The teacher is a U-Net of ADM-256's shape (Dhariwal & Nichol 2021) with random weights. --width
scales its 256 channels. The taps have strides 4 to 32; the images are JPEGs of 480 pixels per side.
Every arm of a round is a separate process. The arms are interleaved and use the same precision:

- naive: a full forward pass with hooks; fp16 features go to one .npz file per image;
- bare: only the truncated forward pass, on a batch in memory: the upper limit;
- dtcache: `extract` with both flips. The rate covers the shards only. The fit takes 2 x 256 passes
  per cache and is timed separately: it is 1 % of an extraction of 25,600 images.

Results: docs/results/extract-<width>-<device>.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from records import results_flag, write

from dtcache.device import resolve_compute
from dtcache.images import load_views, open_source
from dtcache.images.scenes import scene
from dtcache.options import ExtractOptions
from dtcache.process_settings import configure_process
from dtcache.recipe import ViewSpec
from dtcache.teacher import TeacherSettings, load_teacher, prepare_teacher
from dtcache.teacher.ddpm import build_unet, save_teacher
from pipelines.extract.extract import extract

ARMS = ("naive", "bare", "dtcache")
MULTIPLIERS = (1, 1, 2, 2, 4, 4)
TAPS = ("stride4", "stride8", "stride16", "stride32")
BLOCKS = (0, 1, 2, 3)
TIMESTEP = 150
SIZE = 256
SIDE = 480
GOAL_OVER_NAIVE = 2.2
GOAL_OVER_BARE = {"cpu": 0.9, "cuda": 0.97}
GOAL_PEAK_GIB = 1.0
"""Peak memory of dtcache above that of the bare pass."""


def main() -> None:
    """Run all arms in separate processes and record the ratios, or run one arm in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--width", type=int, default=64, help="channels of the finest level; ADM has 256 [64]"
    )
    parser.add_argument(
        "--images", type=int, default=64, help="images of the dtcache arm, both flips of each [64]"
    )
    parser.add_argument("--passes", type=int, default=4, help="batches of the other two arms [4]")
    parser.add_argument("--batch-size", type=int, default=16, help="views per batch [16]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all arms [3]")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto [auto]")
    results_flag(parser)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args)))
        return
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        started = time.time()
        write_inputs(args)
        rounds = [{arm: run_in_process(args, arm) for arm in ARMS} for _ in range(args.rounds)]
    device = resolve_compute(args.device, "auto").device.type
    result = summary(rounds, device)
    command = (
        f"python benchmarks/extract.py --width {args.width} --images {args.images} "
        f"--passes {args.passes} --batch-size {args.batch_size} --rounds {args.rounds} "
        f"--device {args.device}"
    )
    path = args.results / f"extract-{args.width}-{device}.json"
    write(path, command, result, time.time() - started)
    print(json.dumps(result, indent=1))


def write_inputs(args: argparse.Namespace) -> None:
    """Write the teacher, and generated scenes as JPEGs."""
    torch.manual_seed(0)
    channels = tuple(args.width * m for m in MULTIPLIERS)
    save_teacher(
        build_unet(SIZE, SIZE, channels, layers=2, attention=3),
        args.work / "teacher",
        torch.float32,
    )
    (args.work / "images").mkdir()
    for index in range(args.images):
        image = Image.fromarray(scene(0, index, SIDE).pixels)
        image.save(args.work / "images" / f"{index:05d}.jpg", quality=90)


def run_in_process(args: argparse.Namespace, arm: str) -> dict[str, float]:
    """Run one arm in a separate process; return its rate and memory."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k != "arm"]
    command = [sys.executable, __file__, "--arm", arm, *flags]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    print(arm, result, file=sys.stderr, flush=True)
    return result


def run_arm(args: argparse.Namespace) -> dict[str, float]:
    """Return views per second and peak memory (GiB) of one arm; start-up is not timed."""
    compute = resolve_compute(args.device, "auto")
    configure_process(compute.device)
    arms = {"naive": run_naive, "bare": run_bare, "dtcache": run_dtcache}
    result = arms[args.arm](args)
    host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result["peak_gib"] = (
        torch.cuda.max_memory_allocated() / 2**30 if compute.device.type == "cuda" else host_peak
    )
    result["host_peak_gib"] = host_peak
    return result


def run_naive(args: argparse.Namespace) -> dict[str, float]:
    """Run the full U-Net on decoded images and save fp16 taps, one file per image."""
    compute = resolve_compute(args.device, "auto")
    loaded = load_teacher(str(args.work / "teacher"))
    unet = loaded.denoiser.unet.to(compute.device)
    taps: dict[str, torch.Tensor] = {}
    for index in BLOCKS:
        block = unet.up_blocks[index]
        block.resnets[-1].register_forward_hook(
            lambda m, inputs, out, index=index: taps.__setitem__(f"block{index}", out)
        )
    alpha_bar = loaded.alpha_bars[TIMESTEP].to(compute.device)
    count = args.passes * args.batch_size
    source = open_source(args.work / "images")
    view = ViewSpec(height=SIZE, width=SIZE)
    views = load_views(
        source, (i % args.images for i in range(count + args.batch_size)), view, threads=2
    )

    def batch(start: int) -> None:
        pixels = np.stack([next(views).pixels_CHW for _ in range(args.batch_size)])
        clean = torch.from_numpy(pixels).to(compute.device).float() / 127.5 - 1
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * torch.randn_like(clean)
        with torch.inference_mode(), compute.autocast():
            unet(noisy, torch.full((len(noisy),), TIMESTEP, device=compute.device))
        half = {name: maps.half().cpu().numpy() for name, maps in taps.items()}
        for i in range(args.batch_size):
            np.savez(
                args.work / f"naive-{start + i}.npz",
                **{name: maps[i] for name, maps in half.items()},
            )

    batch(0)
    started = time.perf_counter()
    for start in range(0, count, args.batch_size):
        batch(start)
    return {"views_per_second": count / (time.perf_counter() - started)}


def run_bare(args: argparse.Namespace) -> dict[str, float]:
    """Run the truncated U-Net repeatedly on one batch."""
    compute = resolve_compute(args.device, "auto")
    teacher = prepare_teacher(
        load_teacher(str(args.work / "teacher")),
        TeacherSettings(
            view=ViewSpec(height=SIZE, width=SIZE),
            taps=TAPS,
            timesteps=(TIMESTEP,),
            batch_size=args.batch_size,
        ),
        compute,
    )
    noisy = torch.randn(args.batch_size, 3, SIZE, SIZE, device=compute.device)
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    t_B = torch.full((args.batch_size,), TIMESTEP, device=compute.device)

    def time_passes(count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode(), compute.autocast():
            for _ in range(count):
                teacher.network(noisy, t_B)
        if compute.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    time_passes(1)
    return {"views_per_second": args.passes * args.batch_size / time_passes(args.passes)}


def run_dtcache(args: argparse.Namespace) -> dict[str, float]:
    """Extract a cache. The peak memory includes the fit; the fit's time is separate."""
    with tempfile.TemporaryDirectory(dir=args.work) as out:
        options = ExtractOptions(
            teacher=str(args.work / "teacher"),
            timestep=(TIMESTEP,),
            taps="4,8,16,32",
            batch_size=args.batch_size,
            device=args.device,
        )
        extracted = extract(args.work / "images", Path(out) / "cache", options)
    return {
        "views_per_second": 2 * args.images / extracted.shard_seconds,
        "fit_seconds": extracted.fit_seconds,
        "fit_views_per_second": 2 * args.images / extracted.fit_seconds,
    }


def summary(rounds: list[dict[str, dict[str, float]]], device: str) -> dict[str, Any]:
    """Return medians over the rounds, medians of the ratios within a round, and the goals met."""

    def median(values: Iterable[float]) -> float:
        return round(statistics.median(values), 3)

    rate = "views_per_second"
    over_naive = median(r["dtcache"][rate] / r["naive"][rate] for r in rounds)
    over_bare = median(r["dtcache"][rate] / r["bare"][rate] for r in rounds)
    additional_peak = median(r["dtcache"]["peak_gib"] - r["bare"]["peak_gib"] for r in rounds)
    return {
        "views_per_second": {arm: median(r[arm][rate] for r in rounds) for arm in ARMS},
        "fit_seconds": median(r["dtcache"]["fit_seconds"] for r in rounds),
        "rate_over_naive": over_naive,
        "rate_over_bare": over_bare,
        "peak_minus_bare_gib": additional_peak,
        "goals_met": {
            "rate_over_naive": over_naive >= GOAL_OVER_NAIVE,
            "rate_over_bare": over_bare >= GOAL_OVER_BARE[device],
            "peak_minus_bare_gib": additional_peak <= GOAL_PEAK_GIB,
        },
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()
