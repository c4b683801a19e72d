"""Small teachers of every kind, written with diffusers alone; each writer returns its modules."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTTransformer2DModel,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

TOKENS = 7
TEXT_CHANNELS = 16


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def save_stable_diffusion(
    root: Path, **unet_options: Any
) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """Write a text-conditioned latent teacher of 32 px without a text encoder.

    Its latent stride is 4, and its U-Net has strides 1, 2 and 4.
    """
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(
            2,
            4,
            8,
        ),  # a list, as Stable Diffusion 2.x has it: numbers of heads, whatever its name
        cross_attention_dim=TEXT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **unet_options,
    ).eval()
    unet.save_pretrained(root / "unet")
    # As in Stable Diffusion 1.x: the file of a sampler, with betas other than the defaults.
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
    ).save_pretrained(root / "scheduler")
    return unet, save_kl(root / "vae")


def save_kl(folder: Path) -> AutoencoderKL:
    """Write an autoencoder of latent stride 4 with 4 latent channels."""
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ).eval()
    vae.save_pretrained(folder)
    return vae


def save_ldm(root: Path) -> tuple[UNet2DModel, VQModel]:
    """Write an unconditional latent teacher of 32 px on a VQ autoencoder of stride 2."""
    torch.manual_seed(3)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).eval()
    unet.save_pretrained(root / "unet")
    vae = VQModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=5,
        vq_embed_dim=3,
        num_vq_embeddings=16,
    ).eval()
    vae.save_pretrained(root / "vqvae")
    DDPMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear"
    ).save_pretrained(root / "scheduler")
    return unet, vae


def save_dit(root: Path, blocks: int = 6) -> tuple[DiTTransformer2DModel, AutoencoderKL]:
    """Write a DiT of 32 px, 3 classes, `blocks` blocks of 16 channels at stride 8."""
    torch.manual_seed(4)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
    ).eval()
    transformer.save_pretrained(root / "transformer")
    DDPMScheduler().save_pretrained(root / "scheduler")
    return transformer, save_kl(root / "vae")


def save_class_unet(root: Path, classes: int = 8) -> UNet2DModel:
    """Write a class-conditional pixel U-Net of 32 px, as a converted ADM is."""
    torch.manual_seed(5)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    ).eval()
    unet.save_pretrained(root / "unet")
    DDPMScheduler().save_pretrained(root / "scheduler")
    return unet


def hooked_unet(
    unet: Any, strides: Sequence[int], *inputs: torch.Tensor, **told: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Run a full U-Net and return the inputs of its upsamplers by name, for `strides`."""
    seen: dict[str, torch.Tensor] = {}
    for stride, block in zip(strides, unet.up_blocks, strict=True):
        if block.upsamplers:
            block.upsamplers[0].register_forward_pre_hook(
                lambda m, args, s=stride: seen.update({f"stride{s}": args[0]})
            )
        else:
            block.register_forward_hook(
                lambda m, args, out, s=stride: seen.update({f"stride{s}": out})
            )
    with torch.inference_mode():
        unet(*inputs, **told)
    return seen


def hooked_transformer(
    transformer: Any, size: tuple[int, int], *inputs: torch.Tensor, **told: torch.Tensor
) -> dict:
    """Run a full DiT and return every block's tokens as a map of `size`."""
    seen: dict[str, torch.Tensor] = {}

    def folded(tokens_BND: torch.Tensor) -> torch.Tensor:
        rows, columns = size
        maps = torch.empty(len(tokens_BND), tokens_BND.shape[2], rows, columns)
        for place in range(rows * columns):
            maps[:, :, place // columns, place % columns] = tokens_BND[:, place]
        return maps

    for number, block in enumerate(transformer.transformer_blocks):
        block.register_forward_hook(
            lambda m, args, out, n=number: seen.update({f"block{n}": folded(out)})
        )
    with torch.inference_mode():
        transformer(*inputs, **told)
    return seen
