"""What the whole of stage 1 costs beside its teacher's bare pass, and beside what today's scripts
do.

    python benchmarks/extract.py [--width 64] [--images 64] [--rounds 3] \
        [--device cuda --width 256 --batch-size 64]

A U-Net of ADM-256's shape (Dhariwal & Nichol 2021), its 256 channels scaled to --width, random
weights; taps at strides 4 to 32; JPEGs of 480 pixels a side. Every arm of a round is a process of
its own, arms interleaved, all in the same precision:

- naive: full forward pass with hooks, fp16 features to one .npz file an image;
- bare: the truncated forward pass on a batch that is there, and nothing else: the limit;
- dtcache: `extract` of both flips; images/s count the shards alone. The fit, 2 x 256 passes per
  cache, is timed separately: it is 1 % of an extraction of 25,600 images.

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from records import results_flag, write

from dtcache.device import configure_process, resolve_compute
from dtcache.images import load_views, open_source
from dtcache.images.scenes import scene
from dtcache.options import ExtractOptions
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
GOALS = {"over_naive": 2.2, "of_bare_cpu": 0.9, "of_bare_cuda": 0.97, "memory_gib": 1.0}


def main() -> None:
    """Run all arms of all rounds, print the ratios and keep them; or run one arm and print its
    figures.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--width", type=int, default=64, help="channels of the finest level; ADM has 256"
    )
    parser.add_argument(
        "--images", type=int, default=64, help="images of the dtcache arm, both flips of each"
    )
    parser.add_argument("--passes", type=int, default=4, help="batches of the other two arms")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    results_flag(parser)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.arm:
        print(json.dumps(run_arm(asked)))
        return
    with tempfile.TemporaryDirectory() as work:
        asked.work = Path(work)
        started = time.time()
        prepare(asked)
        rounds = [{arm: in_process(asked, arm) for arm in ARMS} for _ in range(asked.rounds)]
    device = resolve_compute(asked.device, "auto").device.type
    result = summary(rounds, device)
    command = f"python benchmarks/extract.py --width {asked.width} --images {asked.images} "
    command += f"--passes {asked.passes} "
    command += f"--batch-size {asked.batch_size} --rounds {asked.rounds} --device {asked.device}"
    write(
        asked.results / f"extract-{asked.width}-{device}.json",
        command,
        result,
        time.time() - started,
    )
    print(json.dumps(result, indent=1))


def prepare(asked: argparse.Namespace) -> None:
    """Write teacher and photographs' stand-ins."""
    torch.manual_seed(0)
    channels = tuple(asked.width * m for m in MULTIPLIERS)
    save_teacher(
        build_unet(SIZE, SIZE, channels, layers=2, attention=3),
        asked.work / "teacher",
        torch.float32,
    )
    (asked.work / "images").mkdir()
    for index in range(asked.images):
        image = Image.fromarray(scene(0, index, SIDE).pixels)
        image.save(asked.work / "images" / f"{index:05d}.jpg", quality=90)


def in_process(asked: argparse.Namespace, arm: str) -> dict[str, float]:
    """Run one arm in a process of its own."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(asked).items() if k not in ("arm",)]
    command = [sys.executable, __file__, "--arm", arm, *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(arm, found, file=sys.stderr, flush=True)
    return found


def run_arm(asked: argparse.Namespace) -> dict[str, float]:
    """Return views/s and peak memory (GiB) of one arm; start-up is not counted."""
    compute = resolve_compute(asked.device, "auto")
    configure_process(compute.device)
    found = {"naive": naive, "bare": bare, "dtcache": whole}[asked.arm](asked)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found["peak_gib"] = (
        torch.cuda.max_memory_allocated() / 2**30 if compute.device.type == "cuda" else peak
    )
    found["host_peak_gib"] = peak
    return found


def naive(asked: argparse.Namespace) -> dict[str, float]:
    """Run the whole U-Net on decoded images and save fp16 taps, one file an image, as a script of a
    paper would.
    """
    compute = resolve_compute(asked.device, "auto")
    loaded = load_teacher(str(asked.work / "teacher"))
    unet = loaded.denoiser.unet.to(compute.device)
    seen: dict[str, torch.Tensor] = {}
    for index in BLOCKS:
        block = unet.up_blocks[index]
        block.resnets[-1].register_forward_hook(
            lambda m, args, out, index=index: seen.__setitem__(f"block{index}", out)
        )
    alpha_bar = loaded.alpha_bars[TIMESTEP].to(compute.device)
    count = asked.passes * asked.batch_size
    source = open_source(asked.work / "images")
    view = ViewSpec(height=SIZE, width=SIZE)
    views = load_views(
        source, (i % asked.images for i in range(count + asked.batch_size)), view, threads=2
    )

    def batch(start: int) -> None:
        pixels = np.stack([next(views).pixels_CHW for _ in range(asked.batch_size)])
        clean = torch.from_numpy(pixels).to(compute.device).float() / 127.5 - 1
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * torch.randn_like(clean)
        with torch.inference_mode(), compute.autocast():
            unet(noisy, torch.full((len(noisy),), TIMESTEP, device=compute.device))
        half = {name: maps.half().cpu().numpy() for name, maps in seen.items()}
        for i in range(asked.batch_size):
            np.savez(
                asked.work / f"naive-{start + i}.npz",
                **{name: maps[i] for name, maps in half.items()},
            )

    batch(0)
    started = time.perf_counter()
    for start in range(0, count, asked.batch_size):
        batch(start)
    return {"views_per_second": count / (time.perf_counter() - started)}


def bare(asked: argparse.Namespace) -> dict[str, float]:
    """Run the truncated U-Net on one batch, over and over."""
    compute = resolve_compute(asked.device, "auto")
    teacher = prepare_teacher(
        load_teacher(str(asked.work / "teacher")),
        TeacherSettings(
            view=ViewSpec(height=SIZE, width=SIZE),
            taps=TAPS,
            timesteps=(TIMESTEP,),
            batch_size=asked.batch_size,
        ),
        compute,
    )
    noisy = torch.randn(asked.batch_size, 3, SIZE, SIZE, device=compute.device)
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    t_B = torch.full((asked.batch_size,), TIMESTEP, device=compute.device)

    def passes(count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode(), compute.autocast():
            for _ in range(count):
                teacher.network(noisy, t_B)
        if compute.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    passes(1)
    return {"views_per_second": asked.passes * asked.batch_size / passes(asked.passes)}


def whole(asked: argparse.Namespace) -> dict[str, float]:
    """Extract a cache, fit included in the peak memory and told apart in time."""
    with tempfile.TemporaryDirectory(dir=asked.work) as out:
        options = ExtractOptions(
            teacher=str(asked.work / "teacher"),
            timestep=(TIMESTEP,),
            taps="4,8,16,32",
            batch_size=asked.batch_size,
            device=asked.device,
        )
        done = extract(asked.work / "images", Path(out) / "cache", options)
    return {
        "views_per_second": 2 * asked.images / done.shard_seconds,
        "fit_seconds": done.fit_seconds,
        "fit_views_per_second": 2 * asked.images / done.fit_seconds,
    }


def summary(rounds: list[dict[str, dict[str, float]]], device: str) -> dict[str, Any]:
    """Return medians over the rounds, ratios of pairs, and each goal beside what was reached."""

    def median(of: Any) -> float:
        return round(statistics.median(of(r) for r in rounds), 3)

    rate = "views_per_second"
    over_naive = median(lambda r: r["dtcache"][rate] / r["naive"][rate])
    of_bare = median(lambda r: r["dtcache"][rate] / r["bare"][rate])
    memory = median(lambda r: r["dtcache"]["peak_gib"] - r["bare"]["peak_gib"])
    return {
        "views_per_second": {arm: median(lambda r, arm=arm: r[arm][rate]) for arm in ARMS},
        "fit_seconds": median(lambda r: r["dtcache"]["fit_seconds"]),
        "over_naive": over_naive,
        "of_bare": of_bare,
        "peak_over_bare_gib": memory,
        "met": {
            "over_naive": over_naive >= GOALS["over_naive"],
            "of_bare": of_bare >= GOALS[f"of_bare_{device}"],
            "memory": memory <= GOALS["memory_gib"],
        },
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()
