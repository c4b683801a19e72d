"""Guided-diffusion (ADM) weights under the names, shapes and order of a UNet2DModel."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dtcache.errors import DiskError, TeacherError
from dtcache.teacher.adm.architecture import STEPS, AdmArchitecture, AdmSettings
from dtcache.teacher.attention_heads import set_heads, stand_in
from dtcache.teacher.diffusers_files import WEIGHTS

QKV = {"to_q": 0, "to_k": 1, "to_v": 2}
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_proj": "time_proj",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
TIME = "time_embed.0.weight"
LOST = 1e-7
"""Share of a timestep table's norm that a narrower table may lose; below the rounding of fp32."""


def blank_unet(config: dict[str, Any]) -> UNet2DModel:
    """Return a configuration's network on torch's meta device, without memory for its weights."""
    with torch.device("meta"):
        unet = UNet2DModel(**{**config, **stand_in(config)})
    set_heads(unet, config)
    return unet


def convert_weights(
    weights: Mapping[str, Tensor],
    architecture: AdmArchitecture,
    settings: AdmSettings,
    shapes: Mapping[str, torch.Size],
) -> dict[str, Tensor]:
    """Return the tensors of a UNet2DModel with these `shapes` by name, in the checkpoint's dtype.

    Raises TeacherError naming the first tensor that is missing, superfluous, or of another shape.
    """
    if architecture.time_channels != architecture.channels[0]:
        weights = {**weights, **_narrow_timesteps(weights[TIME], architecture.channels[0])}
    names = module_names(architecture)
    left = dict.fromkeys(weights)
    converted = {}
    for key, shape in shapes.items():
        module, _, parameter = key.rpartition(".")
        source = f"{names[module]}.{parameter}"
        if source not in weights:
            raise TeacherError(f"not a complete ADM U-Net: {source} is missing")
        qkv_index = QKV.get(module.rpartition(".")[2])
        rows = shape[0] if qkv_index is None else 3 * shape[0]
        tensor = weights[source]
        if len(shape) == 2 and tensor.ndim > 2 and tensor.shape[2:].numel() == 1:
            # ADM's attention projections are convolutions of width 1, diffusers' are linear layers.
            tensor = tensor.flatten(1)
        if tensor.shape != (rows, *shape[1:]):
            raise TeacherError(
                f"not an ADM U-Net: {source}: expected shape {[rows, *shape[1:]]}, which fits the "
                f"other tensors, got {list(weights[source].shape)}"
            )
        if qkv_index is not None:
            heads = settings.heads or shape[0] // (settings.head_channels or 1)
            tensor = split_qkv(tensor, heads, settings.order)[qkv_index]
        converted[key] = tensor.contiguous()
        left.pop(source, None)
    if left:
        raise TeacherError(
            f"not an ADM U-Net: {next(iter(left))} is not part of one ({len(left)} superfluous "
            "tensors)"
        )
    return converted


def split_qkv(rows: Tensor, heads: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows (3C, ...) as q, k and v, each (C, ...), one head after the other.

    guided-diffusion's QKVAttentionLegacy orders the 3C rows as [heads, 3, width], its QKVAttention
    as [3, heads, width]. The wrong order fits every shape but computes different features.
    """
    axes = (heads, 3) if order == "legacy" else (3, heads)
    split = rows.reshape(*axes, len(rows) // (3 * heads), *rows.shape[1:])
    q, k, v = (third.reshape(-1, *rows.shape[1:]) for third in split.unbind(axes.index(3)))
    return q, k, v


def module_names(architecture: AdmArchitecture) -> dict[str, str]:
    """Return ADM's name of every module that the UNet2DModel may have, by diffusers' name."""
    names = dict(ENDS)
    for ours, theirs, leaves in _layers(architecture):
        names.update({f"{ours}.{leaf}": f"{theirs}.{old}" for leaf, old in leaves.items()})
    return names


def _layers(architecture: AdmArchitecture) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield (our layer, ADM's layer, ADM's leaf names by ours) in the order of a forward pass."""
    residual = architecture.resample == "resnet"
    block = 1
    for level in range(len(architecture.channels)):
        for i in range(architecture.blocks):
            yield f"down_blocks.{level}.resnets.{i}", f"input_blocks.{block}.0", RESIDUAL
            yield f"down_blocks.{level}.attentions.{i}", f"input_blocks.{block}.1", ATTENTION
            block += 1
        yield (
            f"down_blocks.{level}.downsamplers.0",
            f"input_blocks.{block}.0",
            RESIDUAL if residual else {"conv": "op"},
        )
        block += 1
    yield "mid_block.resnets.0", "middle_block.0", RESIDUAL
    yield "mid_block.attentions.0", "middle_block.1", ATTENTION
    yield "mid_block.resnets.1", "middle_block.2", RESIDUAL
    block = 0
    for level, attends in enumerate(reversed(architecture.attention)):
        for i in range(architecture.blocks + 1):
            yield f"up_blocks.{level}.resnets.{i}", f"output_blocks.{block}.0", RESIDUAL
            yield f"up_blocks.{level}.attentions.{i}", f"output_blocks.{block}.1", ATTENTION
            block += 1
        upsampler = f"output_blocks.{block - 1}.{2 if attends else 1}"
        yield (
            f"up_blocks.{level}.upsamplers.0",
            upsampler,
            RESIDUAL if residual else {"conv": "conv"},
        )


def _narrow_timesteps(weight_EM: Tensor, width: int) -> dict[str, Tensor]:
    """Return a narrower timestep embedding, and the first layer's weights for it.

    The embedding is a table of `width` numbers per timestep, in place of M sinusoids. UNet2DModel
    embeds timesteps in as many channels as its first level has. ADM uses its base channels, twice
    as many at 512 px. Over the 1000 training timesteps, ADM's 256 sinusoids lie within 4e-8 of a
    128-dimensional space, so a table of their coordinates in that space loses nothing. Raises
    TeacherError if a table would lose something.
    """
    half = weight_EM.shape[1] // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(STEPS, dtype=torch.float32)[:, None] * frequencies
    table_TM = torch.cat([angles.cos(), angles.sin()], dim=1).double()
    _, singular, basis_MM = torch.linalg.svd(table_TM, full_matrices=False)
    lost = float(singular[width:].norm() / singular.norm())
    if table_TM.shape[1] != weight_EM.shape[1] or len(basis_MM) < width or lost > LOST:
        raise TeacherError(
            f"expected timesteps that fit into the {width} channels of the first level, got an "
            f"embedding of {weight_EM.shape[1]} channels: diffusers' UNet2DModel would lose "
            f"{lost:.0e} of the table; dtcache cannot convert this model"
        )
    basis_WM = basis_MM[:width]
    narrowed = weight_EM.double() @ basis_WM.T.to(weight_EM.device)
    return {"time_proj.weight": (table_TM @ basis_WM.T).float(), TIME: narrowed.to(weight_EM.dtype)}


def save_converted(
    folder: Path, unet: UNet2DModel, weights: Mapping[str, Tensor], scheduler: dict[str, Any]
) -> None:
    """Write unet/ and scheduler/ as `save_pretrained` would, without building the network.

    Raises DiskError if the weights cannot be written.
    """
    unet.save_config(folder / "unet")
    path = folder / "unet" / WEIGHTS
    try:
        save_file(dict(weights), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise DiskError(
            f"cannot write {path}: {error}; free disk space and run the same command again"
        ) from error
    DDPMScheduler(**scheduler).save_pretrained(folder / "scheduler")
