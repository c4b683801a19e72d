"""Loading a teacher: JSON and safetensors only, and none of its code runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from dtcache.errors import ConfigError, TeacherError
from dtcache.hashing import sha256_json
from dtcache.options.parse import timm_name
from dtcache.recipe import Json
from dtcache.teacher.attention_heads import set_heads, stand_in
from dtcache.teacher.autoencoder import read_autoencoder
from dtcache.teacher.condition import class_names
from dtcache.teacher.denoiser import Denoiser
from dtcache.teacher.diffusers_files import (
    TEXT_WEIGHTS,
    WEIGHTS,
    TeacherFolder,
    hash_weights,
    load_part,
    locate,
    read_class,
    read_config,
    weight_files,
)
from dtcache.teacher.dit import TransformerDenoiser
from dtcache.teacher.layout import find_network, layout_warnings
from dtcache.teacher.loaded_teacher import LoadedTeacher
from dtcache.teacher.noise_schedule import read_schedule
from dtcache.teacher.prompt import Prompt, embed_prompt, require_text_encoder
from dtcache.teacher.supported import input_warnings, require_supported
from dtcache.teacher.timm_teacher import load_timm_teacher
from dtcache.teacher.unet import UNetDenoiser

ARCHITECTURES: dict[str, Any] = {
    "UNet2DModel": UNet2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "DiTTransformer2DModel": DiTTransformer2DModel,
    # The class name of a DiT before diffusers 0.30.
    "Transformer2DModel": DiTTransformer2DModel,
}


def load_teacher(
    where: str, *, prompt: str | None = None, stored: Prompt | None = None
) -> LoadedTeacher:
    """Load a teacher from a directory, a Hugging Face id, or `timm:` and a timm name.

    A text-conditioned teacher embeds `prompt` (None stands for the empty one), unless `stored`
    holds that prompt's embedding.

    Raises TeacherNotFoundError if there is no teacher, TeacherError if a part is missing or if the
    teacher cannot be used safely, and ConfigError for an unknown timm name, or for a prompt if the
    teacher reads no text.
    """
    name = timm_name(where)
    if name is None:
        return _load_diffusers(where, prompt, stored)
    if prompt is not None:
        raise ConfigError("`prompt`: a timm teacher reads no text; leave `prompt` out")
    return load_timm_teacher(name)


def _load_diffusers(where: str, prompt: str | None, stored: Prompt | None) -> LoadedTeacher:
    """Load a diffusers teacher: a directory of save_pretrained, or flat as google/ddpm-*.

    It holds a U-Net or DiT of pixels or, with an autoencoder, of latents.
    """
    files = locate(where)
    root = files.root
    folder = find_network(root)
    path = folder / "config.json"
    name, config = read_class(folder, "the network's configuration", tuple(ARCHITECTURES))
    schedule = read_schedule(root)
    autoencoder = read_autoencoder(root)
    require_supported(path, name, config, autoencoder is not None)
    reads_text = name == "UNet2DConditionModel"
    if not reads_text and prompt is not None:
        raise ConfigError(f"`prompt`: this teacher ({name}) reads no text; leave `prompt` out")
    if autoencoder is not None and config.get("in_channels") != autoencoder.channels:
        raise TeacherError(
            f"{path}: expected in_channels={autoencoder.channels}, the channels of "
            f"the autoencoder's latents, got {config.get('in_channels')}; use a model that reads "
            "no masks or images besides the latents"
        )
    text = prompt or ""
    embedded = stored if stored is not None and stored.text == text and reads_text else None
    needs_encoder = reads_text and embedded is None
    if needs_encoder:
        require_text_encoder(root)
    folders = [folder] if autoencoder is None else [folder, autoencoder.folder]
    _fetch(files, folders, needs_encoder)

    weights = weight_files(folder)
    # In a UNet2DModel, a list of head widths comes from `dtcache teacher convert`; in a
    # UNet2DConditionModel, diffusers reads the list itself.
    converted = config if name == "UNet2DModel" else {}
    network = load_part(ARCHITECTURES[name], folder, weights, **stand_in(converted))
    set_heads(network, converted)
    latents = None
    latent_weights: list[Path] = []
    if autoencoder is not None:
        latent_weights = weight_files(autoencoder.folder)
        latents = autoencoder.load(latent_weights)
    if needs_encoder:
        embedded = embed_prompt(root, text)
    hashed = [config, schedule.config]
    return LoadedTeacher(
        denoiser=_denoiser(network, embedded),
        latents=latents,
        prompt=embedded,
        alpha_bars=schedule.alpha_bars,
        architecture=name,
        weights_sha256=hash_weights(root, [*weights, *latent_weights]),
        config_sha256=sha256_json(
            hashed if autoencoder is None else [*hashed, autoencoder.to_hash()]
        ),
        schedule=schedule.kind,
        prediction=schedule.prediction,
        class_names=class_names([_pipeline_config(root), config]),
        warnings=tuple(
            [
                *layout_warnings(root, folder),
                *input_warnings(path, config),
                *([latents.scale_warning] if latents and latents.scale_warning else []),
            ]
        ),
    )


def _pipeline_config(root: Path) -> Json:
    """Return the contents of model_index.json; nothing if there is no such file."""
    path = root / "model_index.json"
    return read_config(path, "the pipeline's configuration") if path.is_file() else {}


def _fetch(files: TeacherFolder, folders: Sequence[Path], needs_encoder: bool) -> None:
    """Download the weights of the networks in `folders`, and of the text encoder if needed."""
    weights = [folder / WEIGHTS for folder in folders]
    others = []
    if needs_encoder:
        weights.append(files.root / "text_encoder" / TEXT_WEIGHTS)
        others.append(files.root / "tokenizer" / "merges.txt")
    files.fetch(weights, others)


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
