"""The intact inputs that are mutated: images, teachers, caches, runs, an interpreter."""

import os
from pathlib import Path
from unittest.mock import patch

import torch
from support.cli import run

from dtcache.store.writer import CacheWriter
from dtcache.teacher.ddpm import build_unet, save_teacher
from pipelines.train import trainer
from pipelines.write_scenes import write_scenes

SECRET = "canary-51c0b2f7"
"""Text of a file outside the given folders. It must appear in no output."""
EXTRACT = (
    "--timestep 150 --taps 4,8 --precision fp32 --device cpu --batch-size 8 --shard-rows 8 "
    "--bytes-per-image 600"
)
TRAIN = (
    "--student test_resnet --fpn-width 8 --regressor fpn --batch-size 8 --device cpu "
    "--precision fp32 --log-with none --save-every 1 --num-workers 1 --epochs 2"
)


def write_originals(base: Path) -> None:
    """Write all originals into an empty folder. Raises RuntimeError if a command fails."""
    os.chdir(base)
    write_scenes(Path("scenes"), seed=7, size=16, count=24)
    torch.manual_seed(3)
    unet = build_unet(16, 16, (8, 8, 16, 16), layers=1, attention=1)
    save_teacher(unet, Path("teacher"), torch.float32)
    extract = f"extract scenes/images --teacher teacher {EXTRACT}"
    _run(f"{extract} --out cache")
    # All shard files of an array of float16 have the same size.
    fp16 = extract.replace("--bytes-per-image 600", "--quality fp16")
    _run(f"{fp16} --out fp16")
    with patch.object(CacheWriter, "seal", side_effect=KeyboardInterrupt):
        _run(f"{extract} --out begun", expected=130)
    Path("begun/commits/000002.json").unlink()
    _run(
        "label fit cache --masks scenes/masks --out interpreter --width 32 --epochs 2 "
        "--warmup-epochs 1 --device cpu --limit 12"
    )
    _run("label write cache interpreter --name parts --masks scenes/masks")
    _run(f"train cache {TRAIN} --out run")
    save = trainer.save_checkpoint
    calls: list[Path] = []

    def save_once(out: Path, state: dict[str, object]) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(out)
        save(out, state)

    with patch.object(trainer, "save_checkpoint", save_once):
        _run(f"train cache {TRAIN} --out begun-run", expected=130)


def write_outside(outside: Path) -> None:
    """Write the folder that no command may change or show."""
    outside.mkdir()
    (outside / "secret.txt").write_text(f"{SECRET} = [{SECRET}]\n" * 3)


def _run(command: str, expected: int = 0) -> None:
    result = run(*command.split())
    if result.exit_code != expected:
        raise RuntimeError(f"dtcache {command}: {result.output}")
