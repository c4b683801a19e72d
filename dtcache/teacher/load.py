"""Loading a diffusers teacher from disk or hub, part by part: JSON and safetensors only, and
nothing of it is run.
"""

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
    # How DiT was saved before diffusers 0.30.
    "Transformer2DModel": DiTTransformer2DModel,
}
NETWORKS = ("unet", "transformer")
# Schedulers of variance-preserving models: the same betas, whatever sampler the file names (design:
# trap 4).
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
# Conditions that a network would want and dtcache does not give, by the key of its configuration.
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
    """A network and its noise schedule, with the hashes that name them."""

    denoiser: Denoiser
    """fp32, in evaluation mode, on the CPU."""
    alpha_bars: torch.Tensor
    """fp32 (steps,): cumulative product of 1 - beta."""
    architecture: str
    weights_sha256: str
    """Over the files of every network that an image passes through."""
    config_sha256: str
    schedule: str = "unknown"
    """Kind of the betas, such as linear."""
    prediction: str = "epsilon"
    """What the network predicts, by diffusers' name."""
    encoding: Encoding | None = None
    """How images become its inputs, where it is not for the schedule to say."""
    latents: LatentEncoder | None = None
    """What makes its input of pixels, likewise; None where it reads the pixels themselves."""
    prompt: Prompt | None = None
    """What it is told, where it is conditioned on text."""

    @property
    def latent_stride(self) -> int:
        """Pixels of a view that one row of the network's input stands for."""
        return self.latents.stride if self.latents is not None else 1


def load_teacher(
    where: str, *, prompt: str | None = None, stored: Prompt | None = None
) -> LoadedTeacher:
    """Load a teacher from a directory (as save_pretrained writes them, or flat as google/ddpm-*) or
    a Hugging Face id.

    A U-Net or DiT on pixels or, with an autoencoder beside it, on latents. One that is conditioned
    on text embeds `prompt` (the empty one by default), unless `stored` is that prompt's embedding.

    Raises TeacherNotFoundError where a part is missing, TeacherError where it is not one that can
    be used safely, and ConfigError for a prompt that it does not read.
    """
    root = locate(where)
    folder = next((root / name for name in NETWORKS if (root / name).is_dir()), root)
    name, config = read_class(folder, "the network's configuration", tuple(ARCHITECTURES))
    _require_served(folder, name, config, any((root / part).is_dir() for part in FOLDERS))
    if name != "UNet2DConditionModel" and prompt is not None:
        raise ConfigError(f"--prompt: this teacher ({name}) reads no text; leave --prompt out")
    schedule = _scheduler_config(root)
    weights = weight_files(folder)
    # A list of head widths is ours in a UNet2DModel; in a UNet2DConditionModel diffusers reads it
    # itself.
    ours = config if name == "UNet2DModel" else {}
    network = load_part(ARCHITECTURES[name], folder, weights, **stand_in(ours))
    set_heads(network, ours)
    try:
        scheduler = DDPMScheduler.from_config(schedule)
    except Exception as error:  # whatever diffusers makes of numbers that are none
        raise TeacherError(
            f"{root}: diffusers cannot make this noise schedule ({error}); download it again"
        ) from error
    found = load_latents(root)
    latents, more, about = found if found is not None else (None, [], None)
    if latents is not None and config.get("in_channels") != latents.channels:
        raise TeacherError(
            f"{folder / 'config.json'}: expected in_channels={latents.channels}, those of the "
            f"autoencoder's latents, got {config.get('in_channels')}; models that read masks or "
            "images beside the latents cannot be tapped"
        )
    told = None
    if name == "UNet2DConditionModel":
        text = prompt or ""
        told = stored if stored is not None and stored.text == text else embed_prompt(root, text)
    return LoadedTeacher(
        denoiser=_denoiser(network, told),
        latents=latents,
        prompt=told,
        alpha_bars=scheduler.alphas_cumprod.float(),
        architecture=name,
        weights_sha256=hash_weights(root, [*weights, *more]),
        config_sha256=sha256_json(
            [config, schedule] if about is None else [config, schedule, about]
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
    told = prompt.embedding_LD.shape[-1]
    wanted = network.config.cross_attention_dim
    if told != wanted:
        raise TeacherError(
            f"the text encoder's embedding has {told} channels, but the U-Net takes {wanted}; the "
            "two belong to different models"
        )
    return UNetDenoiser(network, torch.from_numpy(prompt.embedding_LD.copy()))


def _require_served(folder: Path, name: str, config: Json, has_latents: bool) -> None:
    """Raise TeacherError where the network wants an input that dtcache does not give."""
    path = folder / "config.json"
    if config.get("addition_embed_type") == "text_time":
        raise TeacherError(
            f"{path}: this is Stable Diffusion XL, whose U-Net wants sizes and a second text "
            "encoder; dtcache takes Stable Diffusion 1.x and 2.x"
        )
    for key in UNSERVED.get(name, ()):
        if config.get(key) is not None:
            raise TeacherError(
                f"{path}: {key} is {config[key]!r}, a condition that dtcache cannot give"
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
            f"{path}: expected a model of RGB pixels or an autoencoder beside it (vae/ or vqvae/), "
            f"got in_channels={config.get('in_channels')} and neither folder"
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
