"""Diffusion transformers (DiT, Peebles and Xie 2023) as denoisers: each block is a tap."""

from collections.abc import Mapping, Sequence

from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from dtcache.errors import ConfigError
from dtcache.recipe import TapSpec


class TransformerDenoiser:
    """A DiTTransformer2DModel: class-conditional with a null class; all taps share one stride."""

    def __init__(self, transformer: DiTTransformer2DModel) -> None:
        """Take over `transformer`: fp32, in evaluation mode, on the CPU."""
        self.transformer = transformer
        config = transformer.config
        self.channels: int = config.in_channels
        self.native_size: tuple[int, int] | None = (
            int(config.sample_size),
            int(config.sample_size),
        )
        self.num_classes: int | None = int(config.num_embeds_ada_norm)
        # The class embedder has one row more than classes, for labels dropped in training.
        self.null_class: int | None = int(config.num_embeds_ada_norm)

    def find_taps(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return the tap of every block, first to last.

        Raises ConfigError if the patch size does not divide the view.
        """
        config = self.transformer.config
        stride = int(config.patch_size) * latent_stride
        if height % stride or width % stride:
            raise ConfigError(
                f"`size` {height}x{width}: this transformer reads patches of {stride} pixels; "
                f"expected both sides to be multiples of {stride}"
            )
        channels = int(config.num_attention_heads) * int(config.attention_head_dim)
        return tuple(
            TapSpec(
                name=f"block{block}",
                block=block,
                stride=stride,
                channels=channels,
                height=height // stride,
                width=width // stride,
            )
            for block in range(len(self.transformer.transformer_blocks))
        )

    def find_blocks(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return no taps: `find_taps` has every block."""
        return ()

    def tapped(self, taps: Sequence[TapSpec]) -> nn.Module:
        """Return the transformer, cut off after the last tapped block."""
        return TappedTransformer(self.transformer, {tap.block: tap.name for tap in taps})

    def predictor(self) -> nn.Module:
        """Return the complete transformer."""
        return WholeTransformer(self.transformer)


class WholeTransformer(nn.Module):
    """A DiT whose forward pass returns the prediction alone."""

    def __init__(self, transformer: DiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        """Return the prediction (B, 2 C, H, W), including variances."""
        prediction: Tensor = self.transformer(
            noisy_BCHW, timestep=t_B, class_labels=labels_B, return_dict=False
        )[0]
        return prediction


class TappedTransformer(nn.Module):
    """A DiT that ends after its last tapped block and returns the tapped tokens as maps."""

    def __init__(self, transformer: DiTTransformer2DModel, name_of: Mapping[int, str]) -> None:
        """Take patch embedding and blocks of `transformer`; `name_of` holds tap names by block."""
        super().__init__()
        self.patch_size = int(transformer.config.patch_size)
        self.pos_embed = transformer.pos_embed
        self.blocks = transformer.transformer_blocks[: max(name_of) + 1]
        self.name_of = dict(name_of)

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Return the tapped maps by name, each (B, D, H / patch, W / patch).

        If the size differs from training, diffusers computes the position embedding for the new
        grid.
        """
        grid = (noisy_BCHW.shape[2] // self.patch_size, noisy_BCHW.shape[3] // self.patch_size)
        tokens_BND = self.pos_embed(noisy_BCHW)
        maps = {}
        for number, block in enumerate(self.blocks):
            tokens_BND = block(tokens_BND, timestep=t_B, class_labels=labels_B)
            if number in self.name_of:
                maps[self.name_of[number]] = tokens_BND.transpose(1, 2).unflatten(2, grid)
        return maps
