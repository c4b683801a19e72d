"""An unconditional pixel DDPM: its network, loss, samples and directory."""

import errno
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from torch import Tensor

from dtcache.errors import ConfigError

TRAIN_STEPS = 1000


def build_unet(
    height: int, width: int, channels: tuple[int, ...], layers: int, attention: int
) -> UNet2DModel:
    """Return a randomly initialised DDPM U-Net with attention at its coarsest levels.

    Raises ConfigError if the view cannot be halved once per level, or if the channels have no
    common group size.
    """
    levels = len(channels)
    halvings = 2 ** (levels - 1)
    if height % halvings or width % halvings:
        raise ConfigError(
            f"`size` {height}x{width}: {levels} levels halve the image {levels - 1} times; "
            f"expected both sides to be multiples of {halvings}; change `size` or pass fewer "
            "`channels`"
        )
    if not 0 <= attention <= levels:
        raise ConfigError(f"`attention` {attention}: expected 0 to {levels}, the number of levels")
    groups = math.gcd(32, *channels)
    if groups < 4:
        raise ConfigError(
            f"`channels` {channels}: expected multiples of 4 (for group normalisation)"
        )
    plain = levels - attention
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=3,
        out_channels=3,
        layers_per_block=layers,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * attention,
        up_block_types=("AttnUpBlock2D",) * attention + ("UpBlock2D",) * plain,
        attention_head_dim=math.gcd(32, *channels),
        norm_num_groups=groups,
    )


def ddpm_scheduler() -> DDPMScheduler:
    """Return the linear schedule of 1000 steps of Ho et al. 2020."""
    return DDPMScheduler(num_train_timesteps=TRAIN_STEPS)


def ddpm_loss(
    unet: Callable[..., Any],
    scheduler: DDPMScheduler,
    pixels_BCHW: Tensor,
    noise_BCHW: Tensor,
    t_B: Tensor,
    snr_gamma: float | None = None,
) -> Tensor:
    """Return the mean squared error of the predicted noise, an fp32 scalar.

    Ho et al. 2020, eq. 14. `pixels_BCHW` are uint8; the noise is fp32 of the same shape; `t_B` is
    int64 in [0, 1000). With `snr_gamma`, the error of each sample is weighted by min(SNR(t), gamma)
    / SNR(t): Min-SNR-gamma for a predicted noise (Hang et al. 2023, section 3.4).
    """
    clean_BCHW = pixels_BCHW.float() / 127.5 - 1.0
    noisy_BCHW = scheduler.add_noise(clean_BCHW, noise_BCHW, t_B)
    predicted_BCHW: Tensor = unet(noisy_BCHW, t_B).sample.float()
    if snr_gamma is None:
        return torch.nn.functional.mse_loss(predicted_BCHW, noise_BCHW)
    error_B = (predicted_BCHW - noise_BCHW).square().mean((1, 2, 3))
    signal_B: Tensor = scheduler.alphas_cumprod.to(t_B.device)[t_B]
    snr_B = signal_B / (1 - signal_B)
    return (error_B * snr_B.clamp(max=snr_gamma) / snr_B).mean()


@torch.inference_mode()
def sample_images(unet: UNet2DModel, count: int, seed: int, steps: int = 50) -> Tensor:
    """Return `count` DDIM samples of the teacher, fp32 in [0, 1], shape (count, 3, H, W)."""
    device = next(unet.parameters()).device
    scheduler = DDIMScheduler.from_config(ddpm_scheduler().config)
    scheduler.set_timesteps(steps)
    size = unet.config.sample_size
    shape = (count, 3, *((size, size) if isinstance(size, int) else size))
    x_BCHW = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for t in scheduler.timesteps:
        x_BCHW = scheduler.step(unet(x_BCHW, t).sample.float(), t, x_BCHW).prev_sample
    return (x_BCHW.clamp(-1, 1) + 1) / 2


def save_teacher(unet: UNet2DModel, out: Path, dtype: torch.dtype) -> None:
    """Write a diffusers directory (unet/, scheduler/, model_index.json), with safetensors only.

    Raises OSError, also for a full disk, which safetensors reports as an error of its own.
    """
    # torch's own `to`: diffusers' warns about modules to keep in fp32 even if there are none.
    pipeline = DDPMPipeline(torch.nn.Module.to(unet, dtype), ddpm_scheduler())
    try:
        pipeline.save_pretrained(out, safe_serialization=True)
    except SafetensorError as error:
        code = re.search(r"(?:os error|code:) (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number)) from error
