"""Loading a diffusers teacher: JSON and safetensors only, and none of its code runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from dtcache.errors import ConfigError, TeacherError
from dtcache.hashing import sha256_json
from dtcache.recipe import Json
from dtcache.teacher.attention_heads import set_heads, stand_in
from dtcache.teacher.autoencoder import FOLDERS, LatentEncoder, load_latents
from dtcache.teacher.denoiser import Denoiser
from dtcache.teacher.diffusers_files import (
    hash_weights,
    load_part,
    locate,
    read_class,
    read_config,
    weight_files,
)
from dtcache.teacher.dit import TransformerDenoiser
from dtcache.teacher.noising import Encoding
from dtcache.teacher.prompt import Prompt, embed_prompt
from dtcache.teacher.unet import UNetDenoiser

ARCHITECTURES: dict[str, Any] = {
    "UNet2DModel": UNet2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "DiTTransformer2DModel": DiTTransformer2DModel,
    # The class name of a DiT before diffusers 0.30.
    "Transformer2DModel": DiTTransformer2DModel,
}
NETWORKS = ("unet", "transformer")
# Schedulers of variance-preserving models. The choice of the sampler does not change the betas.
SCHEDULERS = frozenset(
    {
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "DEISMultistepScheduler",
        "DPMSolverSinglestepScheduler",
    }
)
# Conditions that dtcache does not support, by network and key of its configuration.
UNSERVED = {
    "UNet2DModel": ("class_embed_type",),
    "UNet2DConditionModel": (
        "class_embed_type",
        "num_class_embeds",
        "addition_embed_type",
        "encoder_hid_dim",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedTeacher:
    """A network and its noise schedule, with the hashes that identify them."""

    denoiser: Denoiser
    """fp32, in evaluation mode, on the CPU."""
    alpha_bars: torch.Tensor
    """fp32 (steps,): cumulative product of 1 - beta."""
    architecture: str
    weights_sha256: str
    """Over the weight files of every network that an image passes through."""
    config_sha256: str
    schedule: str = "unknown"
    """Kind of the betas, such as linear."""
    prediction: str = "epsilon"
    """diffusers' name of the network's prediction."""
    encoding: Encoding | None = None
    """How images become the network's input; None if the noise schedule defines it."""
    latents: LatentEncoder | None = None
    """The encoder from pixels to the network's input; None if the network reads pixels."""
    prompt: Prompt | None = None
    """The prompt and its embedding; None if the network is not conditioned on text."""

    @property
    def latent_stride(self) -> int:
        """Pixels of a view per row of the network's input."""
        return self.latents.stride if self.latents is not None else 1


def load_teacher(
    where: str, *, prompt: str | None = None, stored: Prompt | None = None
) -> LoadedTeacher:
    """Load a teacher from a directory or a Hugging Face id.

    The directory is one of save_pretrained, or flat as google/ddpm-*. It holds a U-Net or DiT of
    pixels or, with an autoencoder, of latents. A text-conditioned teacher embeds `prompt` (None
    stands for the empty one), unless `stored` holds that prompt's embedding.

    Raises TeacherNotFoundError if a part is missing, TeacherError if the teacher cannot be used
    safely, and ConfigError for a prompt if the teacher reads no text.
    """
    root = locate(where)
    folder = next((root / name for name in NETWORKS if (root / name).is_dir()), root)
    name, config = read_class(folder, "the network's configuration", tuple(ARCHITECTURES))
    _require_served(folder, name, config, any((root / part).is_dir() for part in FOLDERS))
    if name != "UNet2DConditionModel" and prompt is not None:
        raise ConfigError(f"`prompt`: this teacher ({name}) reads no text; leave `prompt` out")
    schedule = _scheduler_config(root)
    weights = weight_files(folder)
    # In a UNet2DModel, a list of head widths comes from `dtcache teacher convert`; in a
    # UNet2DConditionModel, diffusers reads the list itself.
    converted = config if name == "UNet2DModel" else {}
    network = load_part(ARCHITECTURES[name], folder, weights, **stand_in(converted))
    set_heads(network, converted)
    try:
        scheduler = DDPMScheduler.from_config(schedule)
    except Exception as error:  # diffusers raises many types for damaged configurations
        raise TeacherError(
            f"{root}: diffusers cannot make this noise schedule ({error}); download it again"
        ) from error
    latents, latent_weights, latent_config = load_latents(root) or (None, [], None)
    if latents is not None and config.get("in_channels") != latents.channels:
        raise TeacherError(
            f"{folder / 'config.json'}: expected in_channels={latents.channels}, the channels of "
            f"the autoencoder's latents, got {config.get('in_channels')}; use a model that reads "
            "no masks or images besides the latents"
        )
    embedded = None
    if name == "UNet2DConditionModel":
        text = prompt or ""
        embedded = (
            stored if stored is not None and stored.text == text else embed_prompt(root, text)
        )
    return LoadedTeacher(
        denoiser=_denoiser(network, embedded),
        latents=latents,
        prompt=embedded,
        alpha_bars=scheduler.alphas_cumprod.float(),
        architecture=name,
        weights_sha256=hash_weights(root, [*weights, *latent_weights]),
        config_sha256=sha256_json(
            [config, schedule] if latent_config is None else [config, schedule, latent_config]
        ),
        schedule="given"
        if schedule.get("trained_betas")
        else str(schedule.get("beta_schedule", "linear")),
        prediction=str(scheduler.config.prediction_type),
    )


def _denoiser(network: Any, prompt: Prompt | None) -> Denoiser:
    if isinstance(network, DiTTransformer2DModel):
        return TransformerDenoiser(network)
    if prompt is None:
        return UNetDenoiser(network)
    channels = prompt.embedding_LD.shape[-1]
    expected = network.config.cross_attention_dim
    if channels != expected:
        raise TeacherError(
            f"expected a text embedding with {expected} channels, the U-Net's, got {channels}; "
            "text encoder and U-Net belong to different models, download the teacher again"
        )
    return UNetDenoiser(network, torch.from_numpy(prompt.embedding_LD.copy()))


def _require_served(folder: Path, name: str, config: Json, has_latents: bool) -> None:
    """Raise TeacherError if the network needs an input that dtcache does not give."""
    path = folder / "config.json"
    if config.get("addition_embed_type") == "text_time":
        raise TeacherError(
            f"{path}: expected Stable Diffusion 1.x or 2.x, got Stable Diffusion XL, whose U-Net "
            "needs sizes and a second text encoder; use a different teacher"
        )
    for key in UNSERVED.get(name, ()):
        if config.get(key) is not None:
            raise TeacherError(
                f"{path}: expected no {key}, got {config[key]!r}, a condition that dtcache does "
                "not support; use a different teacher"
            )
    is_dit = config.get("norm_type") == "ada_norm_zero" and config.get("patch_size") is not None
    if name == "Transformer2DModel" and not is_dit:
        raise TeacherError(
            f"{path}: expected the Transformer2DModel of a DiT (norm_type ada_norm_zero, with "
            f"patches), got norm_type {config.get('norm_type')!r}, patch_size "
            f"{config.get('patch_size')!r}"
        )
    if not has_latents and (name != "UNet2DModel" or config.get("in_channels") != 3):
        raise TeacherError(
            f"{path}: expected a model of RGB pixels, or an autoencoder in vae/ or vqvae/, got "
            f"in_channels={config.get('in_channels')} and neither folder"
        )


def _scheduler_config(root: Path) -> Json:
    nested = root / "scheduler" / "scheduler_config.json"
    path = nested if nested.is_file() else root / "scheduler_config.json"
    config = read_config(path, "the noise schedule")
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise TeacherError(
            f"{path}: expected the scheduler of a variance-preserving model, got {name!r}"
        )
    return config
