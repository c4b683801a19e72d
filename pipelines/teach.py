"""Stage 0: fit an unconditional DDPM on a user's own images and save it as a diffusers directory."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from dtcache.atomic_files import FolderLock, disk_errors, write_file
from dtcache.average import warmed_up_ema
from dtcache.device import (
    Compute,
    compile_errors,
    compiled,
    configure_process,
    memory_errors,
    resolve_compute,
)
from dtcache.errors import ImagesError, TrainingError
from dtcache.hashing import sha256_json
from dtcache.images import ImageSource, load_views, open_source
from dtcache.options import TeachOptions, parse_ints, parse_size
from dtcache.recipe import ViewSpec
from dtcache.rng import permuted
from dtcache.schedule import warmup_cosine
from dtcache.teacher.ddpm import (
    TRAIN_STEPS,
    build_unet,
    ddpm_loss,
    ddpm_scheduler,
    sample_images,
    save_teacher,
)
from pipelines.runs.folder import CHECKPOINT, claim_run, load_checkpoint, save_checkpoint
from pipelines.runs.plots import plot_curves
from pipelines.terminal.progress import track

LOSSES = "losses.json"
VOLATILE = ("device", "save_every", "samples")


@dataclass(frozen=True, kw_only=True, slots=True)
class Taught:
    """What a finished run left behind."""

    out: Path
    steps: int
    final_loss: float


def teach(images: Path, out: Path, options: TeachOptions) -> Taught:
    """Fit a DDPM on `images`; resumes a run in `out` made with the same options and images.

    Raises CacheMismatchError where `out` holds a run of other options, TrainingError where the loss diverges.
    """
    source = open_source(images, track)
    height, width = parse_size(options.size)
    view = ViewSpec(
        height=height, width=width, fit="stretch" if options.fit == "stretch" else "crop"
    )
    rows = permuted(len(source.keys), seed=options.seed, stream="teach")[: options.limit]
    compute = resolve_compute(options.device, options.precision)
    configure_process(compute.device)
    with FolderLock(out):
        images_sha256 = sha256_json([source.keys[i] for i in rows])
        wanted = {**asdict(options), "precision": compute.precision, "images": images_sha256}
        claim_run(out, wanted, VOLATILE)
        losses_path = out / LOSSES
        if not losses_path.exists():
            _fit(source, rows, view, out, options, compute)
        losses = json.loads(losses_path.read_text())
    return Taught(out=out, steps=options.steps, final_loss=float(np.mean(losses[-100:])))


def _fit(
    source: ImageSource,
    rows: np.ndarray,
    view: ViewSpec,
    out: Path,
    options: TeachOptions,
    compute: Compute,
) -> None:
    """Train from the last checkpoint on; losses.json comes last and marks the run as finished."""
    torch.manual_seed(options.seed)
    unet = build_unet(
        view.height,
        view.width,
        parse_ints(options.channels, "channels"),
        options.layers,
        options.attention,
    )
    unet = unet.to(compute.device).to(memory_format=torch.channels_last)
    ema = AveragedModel(unet, multi_avg_fn=warmed_up_ema(options.ema))
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=options.lr, weight_decay=0.0, betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, options.warmup, options.steps)
    )
    network = compiled(unet) if options.compile else unet
    state = {"unet": unet, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    first, losses = _resume(out, state)

    def batches() -> Iterator[Tensor]:
        stream = _row_stream(
            rows, first * options.batch_size, options.steps * options.batch_size, options.seed
        )
        batch: list[np.ndarray] = []
        for count, loaded in enumerate(load_views(source, stream, view, threads=2), 1):
            if loaded.pixels_CHW is not None:
                batch.append(loaded.pixels_CHW)
            if count % options.batch_size == 0:
                if not batch:
                    raise ImagesError(
                        f"no image of a whole batch could be read ({loaded.failure}); check the source"
                    )
                yield torch.from_numpy(np.stack(batch))
                batch = []

    remedy = "give a smaller --batch-size"
    with (
        memory_errors(options.batch_size, remedy),
        track("teach", options.steps, first) as progress,
    ):
        for step, pixels_BCHW in enumerate(batches(), first):
            loss = _train_step(network, optimizer, pixels_BCHW, step, options.seed, compute)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"teach: the loss is {loss} at step {step}; lower --lr or use --precision fp32"
                )
            schedule.step()
            ema.update_parameters(unet)
            losses.append(loss)
            progress.advance(1, f"loss {np.mean(losses[-100:]):.4f}")
            if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                _save(out, state, step + 1, losses, options)
    _write_pictures(out, ema.module, losses, options)
    write_file(out / LOSSES, json.dumps([round(x, 5) for x in losses]).encode())
    (out / CHECKPOINT).unlink()


def _row_stream(rows: np.ndarray, start: int, stop: int, seed: int) -> Iterator[int]:
    """Yield the source indices of draws [start, stop): a fresh permutation an epoch, a function of the seed alone."""
    epoch = -1
    order = rows
    for position in range(start, stop):
        if position // len(rows) != epoch:
            epoch = position // len(rows)
            order = rows[permuted(len(rows), seed=seed, stream=f"teach-epoch-{epoch}")]
        yield int(order[position % len(rows)])


def _train_step(
    network: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    pixels_BCHW: Tensor,
    step: int,
    seed: int,
    compute: Compute,
) -> float:
    """Take one step; flips, timesteps and noise depend on (seed, step) alone, so that a resumed run is the same run."""
    draw = torch.Generator().manual_seed((seed << 32) + step)
    mirrored = torch.rand(len(pixels_BCHW), generator=draw) < 0.5
    pixels_BCHW = torch.where(mirrored[:, None, None, None], pixels_BCHW.flip(3), pixels_BCHW)
    t_B = torch.randint(0, TRAIN_STEPS, (len(pixels_BCHW),), generator=draw)
    noise_BCHW = torch.randn(pixels_BCHW.shape, generator=draw)
    device = compute.device
    with compute.autocast():
        loss = ddpm_loss(
            network, ddpm_scheduler(), pixels_BCHW.to(device), noise_BCHW.to(device), t_B.to(device)
        )
    with compile_errors():
        loss.backward()
    torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], 1.0
    )
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _resume(out: Path, state: dict[str, Any]) -> tuple[int, list[float]]:
    """Load the last checkpoint, if there is one, and return (finished steps, losses so far)."""
    saved = load_checkpoint(out)
    if saved is None:
        return 0, []
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return saved["step"], saved["losses"]


def _save(
    out: Path, state: dict[str, Any], step: int, losses: list[float], options: TeachOptions
) -> None:
    """Refresh the diffusers directory from the averaged weights, then checkpoint: a kill between repeats both."""
    dtype = torch.float16 if options.weights == "float16" else torch.float32
    with disk_errors(out):
        save_teacher(copy.deepcopy(state["ema"].module), out, dtype)
    save_checkpoint(
        out, {**{n: part.state_dict() for n, part in state.items()}, "step": step, "losses": losses}
    )


def _write_pictures(
    out: Path, unet: torch.nn.Module, losses: list[float], options: TeachOptions
) -> None:
    """Write the loss curve, and a grid of samples where any are asked for."""
    from torchvision.utils import save_image

    with disk_errors(out):
        plot_curves({"loss": losses}, out / "loss.png", title="DDPM loss", xlabel="step", smooth=50)
        if options.samples:
            with track("samples", 1) as progress:
                grid = sample_images(unet, options.samples, options.seed)
                save_image(
                    grid, out / "samples.png", nrow=max(1, round(math.sqrt(options.samples)))
                )
                progress.advance()
