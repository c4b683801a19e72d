"""Compare teachers trained for the same CPU time: widths, Min-SNR weighting, early timesteps only.

    python benchmarks/teacher_pilot.py --data DATA --work WORK [--seconds 720]

Every arm trains for the same CPU time on one core. The script first measures the CPU seconds per
step and then fixes the number of steps of each arm, because the learning-rate schedule depends on
it. A linear probe with a fixed C scores each block of the decoder by its features' mean over the
map. Results: WORK/<arm>.json. The script skips arms with a result, so the same command resumes.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ARMS = {
    "plain": (),
    "wide": ("--channels", "64,96,128,128"),
    "snr5": ("--snr-gamma", "5"),
    "early": ("--max-timestep", "400"),
}
"""Flags of `dtcache teacher train` by arm."""
NARROW = "32,96,128,128"
TIMESTEPS = (20, 50)
PROBE_C = 0.01
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


def probe(teacher: Path, data: Path, count: int, timesteps: tuple[int, ...]) -> dict[str, float]:
    """Return the linear probe's test accuracy (0 to 1) per timestep and block of the U-Net.

    The probe is trained on `count` training images and tested on `count` test images.
    """
    from diffusers import DDPMScheduler, UNet2DModel
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from dtcache.images import load_views, open_source
    from dtcache.recipe import ViewSpec

    unet = UNet2DModel.from_pretrained(teacher / "unet", use_safetensors=True).float().eval()
    unet = torch.nn.Module.to(unet, memory_format=torch.channels_last)
    pooled: dict[str, torch.Tensor] = {}
    blocks = {"mid": unet.mid_block}
    for i, level in enumerate(unet.up_blocks):
        for j, resnet in enumerate(level.resnets):
            attentions = getattr(level, "attentions", None)
            blocks[f"up{i}.{j}"] = attentions[j] if attentions else resnet
    for name, block in blocks.items():
        block.register_forward_hook(
            lambda _m, _i, out, name=name: pooled.update({name: out.float().mean((2, 3))})
        )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    rng = torch.Generator().manual_seed(0)
    view = ViewSpec(height=32, width=32)
    splits = {}
    for split in ("train", "test"):
        source = open_source(data / f"cifar10-{split}.parquet")
        pixels = [v.pixels_CHW for v in load_views(source, range(count), view, threads=1)]
        splits[split] = (
            torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1,
            np.array(source.labels[:count]),
        )
    results = {}
    for t in timesteps:
        features: dict[str, dict[str, list[torch.Tensor]]] = {"train": {}, "test": {}}
        for split, (images, _) in splits.items():
            for batch in images.split(100):
                noise = torch.randn(batch.shape, generator=rng)
                t_B = torch.full((len(batch),), t)
                noisy = scheduler.add_noise(batch, noise, t_B)
                with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                    unet(noisy.to(memory_format=torch.channels_last), t_B)
                for name, x in pooled.items():
                    features[split].setdefault(name, []).append(x)
        for name in blocks:
            train, test = (torch.cat(features[split][name]).numpy() for split in ("train", "test"))
            scale = StandardScaler().fit(train)
            fitted = LogisticRegression(C=PROBE_C, max_iter=500).fit(
                scale.transform(train), splits["train"][1]
            )
            results[f"t{t}/{name}"] = float(fitted.score(scale.transform(test), splits["test"][1]))
    return results


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
        accuracy = probe(args.work / name, args.data, args.images, TIMESTEPS)
        record = {
            "steps": steps,
            "batch": BATCH,
            "flags": flags,
            "cpu_seconds": cpu,
            "accuracy": accuracy,
            "probe_cpu_seconds": time.process_time() - probe_started,
            "images": args.images,
            "C": PROBE_C,
        }
        result.write_text(json.dumps(record, indent=1))
        print(
            name,
            steps,
            f"{cpu:.0f} s",
            {k: round(100 * v, 1) for k, v in accuracy.items()},
            flush=True,
        )


if __name__ == "__main__":
    main()
