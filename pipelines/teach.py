"""Stage 0: train an unconditional DDPM on a user's own images; write a diffusers folder."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.atomic_files import FolderLock, disk_errors, write_file
from dtcache.compilation import compile_errors, compiled
from dtcache.device import Compute, resolve_compute
from dtcache.device_memory import memory_errors
from dtcache.errors import CacheDamagedError, ImagesError, TrainingError, one_line
from dtcache.hashing import sha256_json
from dtcache.images import ImageSource, load_views
from dtcache.optim import Optimization, OptimizationSpec, require_same_tensors
from dtcache.options import TeachOptions, parse_ints, parse_size
from dtcache.options.images import READING_NAMES
from dtcache.process_settings import configure_process
from dtcache.recipe import ViewSpec
from dtcache.regular_files import read_regular
from dtcache.rng import permuted
from dtcache.teacher.ddpm import (
    TRAIN_STEPS,
    build_unet,
    ddpm_loss,
    ddpm_scheduler,
    sample_images,
    save_teacher,
)
from pipelines.runs.checkpoint import (
    checkpoint_errors,
    load_checkpoint,
    require_number,
    save_checkpoint,
)
from pipelines.runs.curves import plot_curves
from pipelines.runs.folder import CHECKPOINT, claim_run
from pipelines.terminal.open_images import open_images
from pipelines.terminal.progress import track

LOSSES = "losses.json"
LOSS_BYTES = 32
"""Most bytes of one loss in losses.json, with its separator."""
KEPT = "kept"
"""Folder of the teachers of `keep_steps`: `RUN/kept/STEP/`."""
VOLATILE = (*READING_NAMES, "device", "save_every", "samples")
"""Options that may change on resume."""
AVERAGED_LOSSES = 100
"""Steps over which the shown loss is averaged."""
THREADS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Taught:
    """A finished run."""

    out: Path
    steps: int
    final_loss: float | None
    """Mean over the last 100 steps; None if the teacher is untrained."""


def teach(images: Path, out: Path, options: TeachOptions) -> Taught:
    """Train a DDPM on `images`, or resume a run in `out` with the same options and images.

    With `steps=0` the teacher has the initial weights of the seed, and there are no pictures.
    Raises CacheMismatchError if `out` holds a run with other options or images, and TrainingError
    if a loss is not finite.
    """
    source = open_images(images, options)
    rows = permuted(len(source.keys), seed=options.seed, stream="teach")[: options.limit]
    compute = resolve_compute(options.device, options.precision)
    configure_process(compute.device)
    trainer = TeacherTrainer(options, compute)
    with FolderLock(out) as folder:
        images_sha256 = sha256_json([source.keys[i] for i in rows])
        identity = {**asdict(options), "precision": compute.precision, "images": images_sha256}
        claim_run(out, identity, VOLATILE)
        if not (out / LOSSES).exists():
            _train(source, rows, out, trainer, folder)
        losses = _losses(out, options.steps)
    final_loss = float(np.mean(losses[-AVERAGED_LOSSES:])) if losses else None
    return Taught(out=out, steps=options.steps, final_loss=final_loss)


def _losses(out: Path, steps: int) -> list[float]:
    """Return the losses of a finished run.

    Raises CacheDamagedError if the file is larger than `steps` losses or holds no list of numbers.
    """
    try:
        losses = json.loads(read_regular(out / LOSSES, LOSS_BYTES * (steps + 1)))
        if not isinstance(losses, list):
            raise TypeError(f"expected a list, got {type(losses).__name__}")
        for value in losses:
            require_number("a loss", value)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CacheDamagedError(
            f"{out / LOSSES}: not the losses of a run ({one_line(error)}); pass another `out`"
        ) from error
    return losses


def _train(
    source: ImageSource,
    rows: NDArray[np.int64],
    out: Path,
    trainer: "TeacherTrainer",
    folder: FolderLock,
) -> None:
    """Train from the last checkpoint on. losses.json is written last: it marks a finished run.

    The first step keeps what is in the locked folder.
    """
    options = trainer.options
    trainer.restore(out)
    if trainer.steps_done == 0 and 0 in options.kept:
        trainer.save_kept(out)
    if options.steps == 0:
        trainer.save(out)
    with (
        memory_errors(options.batch_size, "pass a smaller `batch_size`"),
        track("teacher train", options.steps, trainer.steps_done) as progress,
    ):
        for pixels_BCHW in _batches(source, rows, trainer.steps_done, options):
            trainer.step(pixels_BCHW)
            folder.keep()
            progress.advance(1, f"loss {np.mean(trainer.losses[-AVERAGED_LOSSES:]):.4f}")
            if trainer.steps_done in options.kept:
                trainer.save_kept(out)
            if trainer.steps_done % options.save_every == 0 or trainer.steps_done == options.steps:
                trainer.save(out)
    if trainer.losses:
        _write_pictures(out, trainer.averaged, trainer.losses, options)
    write_file(out / LOSSES, json.dumps([round(x, 5) for x in trainer.losses]).encode())
    (out / CHECKPOINT).unlink()


class TeacherTrainer:
    """A U-Net in training: step, save, restore."""

    def __init__(self, options: TeachOptions, compute: Compute) -> None:
        """Build the U-Net on the device, at step 0. Raises ConfigError for bad options."""
        torch.manual_seed(options.seed)
        unet = build_unet(
            *parse_size(options.size),
            parse_ints(options.channels, "channels"),
            options.layers,
            options.attention,
        )
        self.options = options
        self.steps_done = 0
        self.losses: list[float] = []
        self._compute = compute
        self._unet = unet.to(compute.device).to(memory_format=torch.channels_last)
        self._optimization = Optimization(
            self._unet,
            OptimizationSpec(
                lr=options.lr,
                betas=(0.9, 0.99),
                fused=False,
                warmup_steps=options.warmup,
                total_steps=options.steps,
                clip_grad=1.0,
                ema_decay=options.ema_decay,
            ),
        )
        self._network = compiled(self._unet) if options.compile else self._unet

    def step(self, pixels_BCHW: Tensor) -> None:
        """Take one optimizer step on uint8 images and append its loss to `losses`.

        Flips, timesteps and noise are drawn from (seed, step) alone, so that a resumed run takes
        the same steps. Raises TrainingError, and takes no step, if the loss is not finite.
        """
        options = self.options
        draw = torch.Generator().manual_seed((options.seed << 32) + self.steps_done)
        mirrored = torch.rand(len(pixels_BCHW), generator=draw) < 0.5
        pixels_BCHW = torch.where(mirrored[:, None, None, None], pixels_BCHW.flip(3), pixels_BCHW)
        timesteps = options.max_timestep or TRAIN_STEPS
        t_B = torch.randint(0, timesteps, (len(pixels_BCHW),), generator=draw)
        noise_BCHW = torch.randn(pixels_BCHW.shape, generator=draw)
        device = self._compute.device
        with self._compute.autocast():
            loss = ddpm_loss(
                self._network,
                ddpm_scheduler(),
                pixels_BCHW.to(device),
                noise_BCHW.to(device),
                t_B.to(device),
                snr_gamma=options.snr_gamma,
            )
        with compile_errors():
            self._optimization.backward(loss)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {self.steps_done}; lower `lr` or use "
                "`precision='fp32'`"
            )
        self._optimization.update(self.steps_done)
        self.steps_done += 1
        self.losses.append(value)

    @property
    def averaged(self) -> nn.Module:
        """The U-Net with the EMA of the weights."""
        averaged = self._optimization.averaged
        return self._unet if averaged is None else averaged

    def save(self, out: Path) -> None:
        """Write the teacher (the EMA), then the checkpoint, so that a resumed run repeats both."""
        self._save_teacher(out)
        save_checkpoint(
            out,
            {
                "unet": self._unet.state_dict(),
                **self._optimization.state_dict(),
                "step": self.steps_done,
                "losses": self.losses,
            },
        )

    def save_kept(self, out: Path) -> None:
        """Write the teacher of this step to `kept/STEP/`; a resumed run writes the same files."""
        self._save_teacher(out / KEPT / str(self.steps_done))

    def restore(self, out: Path) -> None:
        """Continue from the run's checkpoint, if there is one."""
        state = load_checkpoint(out)
        if state is not None:
            with checkpoint_errors(out):
                require_number("step", state["step"], kind=int, most=self.options.steps)
                if len(state["losses"]) != state["step"]:
                    raise ValueError("expected one loss per step")
                for value in state["losses"]:
                    require_number("a loss", value)
                require_same_tensors("unet", self._unet.state_dict(), state["unet"])
                self._optimization.load_state_dict(state)
                self._unet.load_state_dict(state["unet"])
                self.steps_done = state["step"]
                self.losses = list(state["losses"])

    def _save_teacher(self, folder: Path) -> None:
        dtype = torch.float16 if self.options.weights == "fp16" else torch.float32
        with disk_errors(folder):
            save_teacher(copy.deepcopy(self.averaged), folder, dtype)


def _batches(
    source: ImageSource, rows: NDArray[np.int64], first_step: int, options: TeachOptions
) -> Iterator[Tensor]:
    """Yield uint8 batches (B, 3, H, W) from a step on; images that cannot be read are left out.

    Raises ImagesError if no image of a batch can be read.
    """
    height, width = parse_size(options.size)
    view = ViewSpec(
        height=height,
        width=width,
        resize_mode="stretch" if options.resize_mode == "stretch" else "crop",
    )
    size = options.batch_size
    stream = _row_stream(rows, first_step * size, options.steps * size, options.seed)
    batch: list[NDArray[np.uint8]] = []
    for count, loaded in enumerate(load_views(source, stream, view, threads=THREADS), 1):
        if loaded.pixels_CHW is not None:
            batch.append(loaded.pixels_CHW)
        if count % size == 0:
            if not batch:
                raise ImagesError(
                    f"no image of a whole batch could be read ({loaded.failure}); check the source"
                )
            yield torch.from_numpy(np.stack(batch))
            batch = []


def _row_stream(rows: NDArray[np.int64], start: int, stop: int, seed: int) -> Iterator[int]:
    """Yield source indices at positions [start, stop); each epoch permutes `rows` by the seed."""
    epoch = -1
    order = rows
    for position in range(start, stop):
        if position // len(rows) != epoch:
            epoch = position // len(rows)
            order = rows[permuted(len(rows), seed=seed, stream=f"teach-epoch-{epoch}")]
        yield int(order[position % len(rows)])


def _write_pictures(out: Path, unet: Any, losses: list[float], options: TeachOptions) -> None:
    """Write the loss curve and, unless `samples` is 0, a grid of samples."""
    from torchvision.utils import save_image

    with disk_errors(out):
        plot_curves({"loss": losses}, out / "loss.png", title="DDPM loss", xlabel="step", smooth=50)
        if options.samples:
            with track("samples", 1) as progress:
                grid = sample_images(unet, options.samples, options.seed)
                columns = max(1, round(math.sqrt(options.samples)))
                save_image(grid, out / "samples.png", nrow=columns)
                progress.advance()
