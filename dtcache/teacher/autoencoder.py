"""The autoencoder of a latent diffusion model: pixels to the latents that its denoiser takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from dtcache.errors import TeacherError
from dtcache.teacher.diffusers_files import load_part, read_class

AUTOENCODERS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
FOLDERS = ("vae", "vqvae")
KL_SCALE = 0.18215
"""Stable Diffusion's scale, which is diffusers' default: its first configurations lack it."""
VQ_SCALE = 1.0
"""The scale of VQ latents, which CompVis' latent-diffusion does not scale.

Converted configurations (ldm-celebahq-256) state no scale. diffusers then uses Stable Diffusion's
0.18215, which breaks LDMPipeline (diffusers issue 6725).
"""


class LatentEncoder(nn.Module):
    """The encoder of an autoencoder: fp32 pixels in [-1, 1] to scaled latents, without sampling."""

    def __init__(self, autoencoder: AutoencoderKL | VQModel, scale: float, shift: float) -> None:
        """Take over `autoencoder` and drop its decoder. latents = (encoded - shift) * scale."""
        super().__init__()
        config = autoencoder.config
        self.is_vq = isinstance(autoencoder, VQModel)
        self.channels: int = (config.vq_embed_dim if self.is_vq else None) or config.latent_channels
        self.stride: int = 2 ** (len(config.block_out_channels) - 1)
        self.scale = scale
        self.shift = shift
        self.scale_warning: str | None = None
        if self.is_vq and scale == KL_SCALE:
            self.scale_warning = (
                f"the VQ autoencoder's scaling_factor is {KL_SCALE}, which save_pretrained writes "
                "if a model states none. CompVis' latent-diffusion models were trained with 1.0; "
                "check the scale of this one"
            )
        autoencoder.decoder = nn.Identity()
        self.autoencoder = autoencoder

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return latents (B, channels, H / stride, W / stride) of pixels (B, 3, H, W)."""
        encoded = self.autoencoder.encode(pixels_BCHW)
        # A VQ denoiser was trained on latents before quantisation. For a KL encoder the mode is
        # used, so that a cache is a function of the image.
        unscaled_BCHW = encoded.latents if self.is_vq else encoded.latent_dist.mode()
        scaled_BCHW: Tensor = (unscaled_BCHW - self.shift) * self.scale
        return scaled_BCHW


@dataclass(frozen=True, kw_only=True, slots=True)
class Autoencoder:
    """An autoencoder that is known to be supported, before its weights are read."""

    folder: Path
    name: str
    config: dict[str, Any]
    scale: float
    shift: float

    @property
    def channels(self) -> int:
        """Channels of the latents, as diffusers builds the encoder."""
        is_vq = self.name == "VQModel"
        default = 3 if is_vq else 4
        quantised = self.config.get("vq_embed_dim") if is_vq else None
        return int(quantised or self.config.get("latent_channels", default))

    def to_hash(self) -> dict[str, Any]:
        """Return what the latents depend on beside the weights."""
        return {
            "autoencoder": self.config,
            "scaling_factor": self.scale,
            "shift_factor": self.shift,
        }

    def load(self, weights: Sequence[Path]) -> LatentEncoder:
        """Read the weights. Raises TeacherError as `load_part` does."""
        module = load_part(AUTOENCODERS[self.name], self.folder, weights)
        return LatentEncoder(module, self.scale, self.shift)


def read_autoencoder(root: Path) -> Autoencoder | None:
    """Return the autoencoder of a directory, or None if it has none.

    Raises TeacherError if its configuration is missing, if its class is not supported, if it reads
    no RGB pixels, or if its latents are normalised by anything but a scale and a shift.
    """
    folder = next((root / name for name in FOLDERS if (root / name).is_dir()), None)
    if folder is None:
        return None
    name, config = read_class(folder, "the autoencoder's configuration", tuple(AUTOENCODERS))
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise TeacherError(
                f"{folder / 'config.json'}: expected latents with a scale and a shift only, got "
                f"{key}; dtcache does not support this autoencoder"
            )
    if config.get("in_channels", 3) != 3:
        raise TeacherError(
            f"{folder / 'config.json'}: expected an autoencoder of RGB pixels, got "
            f"in_channels={config['in_channels']!r}; use a different teacher"
        )
    return Autoencoder(
        folder=folder,
        name=name,
        config=config,
        scale=_number(
            folder, config, "scaling_factor", VQ_SCALE if name == "VQModel" else KL_SCALE
        ),
        shift=_number(folder, config, "shift_factor", 0.0),
    )


def _number(folder: Path, config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not torch.tensor(float(value)).isfinite()
    ):
        raise TeacherError(
            f"{folder / 'config.json'}: expected {key} to be a number, got {value!r}"
        )
    return float(value)
