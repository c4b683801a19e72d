"""A reference of OpenAI's guided-diffusion U-Net, written from its definition for these tests.

Parameters have the names of the published checkpoints, so that `state_dict()` is one. Activation
checkpointing and the half-precision torso change no result and are left out. N is the batch, C
channels, T positions of a map.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, torch's default epsilon of 1e-5."""
    return nn.GroupNorm(32, channels)


def sinusoids(t_N: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of t at frequencies 10000^(-i/half), i = 0 .. half - 1."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = t_N[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Double(nn.Module):
    """Nearest-neighbour upsampling by two, followed by an optional convolution."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Halve(nn.Module):
    """Downsampling by two with a strided convolution or the mean of 2x2 pixels."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.op = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=1)
            if with_conv
            else nn.AvgPool2d(2, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Residual(nn.Module):
    """Norm, SiLU, [resample], conv; time embedding; norm, SiLU, conv.

    The shortcut is resampled, too.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        c_emb: int,
        *,
        scale_shift: bool,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(
            group_norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(c_emb, c_out * (2 if scale_shift else 1))
        )
        self.out_layers = nn.Sequential(
            group_norm(c_out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        e = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(self.resample(x)) + h


class Attention(nn.Module):
    """Self-attention over a map's positions, with either of guided-diffusion's qkv row orders."""

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        n, c, *size = x_NCHW.shape
        x_NCT = x_NCHW.reshape(n, c, -1)
        qkv = self.qkv(self.norm(x_NCT))
        width = c // self.heads
        if self.new_order:  # rows: all of q, all of k, all of v, head by head
            q, k, v = (part.reshape(n * self.heads, width, -1) for part in qkv.chunk(3, dim=1))
        else:  # rows: head by head, q, k and v within each
            q, k, v = qkv.reshape(n * self.heads, 3 * width, -1).split(width, dim=1)
        weight = torch.einsum("bct,bcs->bts", q / width**0.25, k / width**0.25).softmax(dim=-1)
        attended = torch.einsum("bts,bcs->bct", weight, v).reshape(n, c, -1)
        return (x_NCT + self.proj_out(attended)).reshape(n, c, *size)


class Stage(nn.Sequential):
    """Layers of one input or output block; residual blocks get the time embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, Residual) else layer(x)
        return x


class GuidedUNet(nn.Module):
    """The network of Dhariwal and Nichol 2021; `attention` holds the strides with attention."""

    def __init__(
        self,
        *,
        width: int,
        mult: Sequence[float],
        blocks: int,
        attention: Collection[int],
        heads: int | None = None,
        head_channels: int | None = None,
        new_order: bool = False,
        classes: int | None = None,
        out_channels: int = 6,
        in_channels: int = 3,
        scale_shift: bool = True,
        resblock_updown: bool = True,
    ) -> None:
        super().__init__()
        self.width = width
        emb = 4 * width
        channels = [int(width * m) for m in mult]

        def residual(c_in: int, c_out: int, resample: nn.Module | None = None) -> Residual:
            return Residual(c_in, c_out, emb, scale_shift=scale_shift, resample=resample)

        def attend(c: int) -> Attention:
            return Attention(c, c // head_channels if head_channels else heads, new_order)

        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, emb)
        self.input_blocks = nn.ModuleList(
            [Stage(nn.Conv2d(in_channels, channels[0], 3, padding=1))]
        )
        skips = [channels[0]]
        c = channels[0]
        for level, c_level in enumerate(channels):
            for _ in range(blocks):
                layers = [residual(c, c_level)] + [attend(c_level)] * (2**level in attention)
                self.input_blocks.append(Stage(*layers))
                c = c_level
                skips.append(c)
            if level < len(channels) - 1:
                self.input_blocks.append(
                    Stage(residual(c, c, Halve(c, False)) if resblock_updown else Halve(c, True))
                )
                skips.append(c)
        self.middle_block = Stage(residual(c, c), attend(c), residual(c, c))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for i in range(blocks + 1):
                layers = [residual(c + skips.pop(), channels[level])] + [
                    attend(channels[level])
                ] * (2**level in attention)
                c = channels[level]
                if level > 0 and i == blocks:
                    layers.append(
                        residual(c, c, Double(c, False)) if resblock_updown else Double(c, True)
                    )
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(group_norm(c), nn.SiLU(), nn.Conv2d(c, out_channels, 3, padding=1))
        self.per_level = blocks + 1

    def forward(
        self, x: Tensor, t_N: Tensor, label_N: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output and each level's last map before its upsampler, coarsest first."""
        emb = self.time_embed(sinusoids(t_N, self.width).to(x.dtype))
        if label_N is not None:
            emb = emb + self.label_emb(label_N)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        taps = []
        for index, stage in enumerate(self.output_blocks):
            x = torch.cat([x, skips.pop()], dim=1)
            last_of_level = (index + 1) % self.per_level == 0
            has_upsampler = last_of_level and index + 1 < len(self.output_blocks)
            x = stage[:-1](x, emb) if has_upsampler else stage(x, emb)
            if last_of_level:
                taps.append(x)
            if has_upsampler:
                x = stage[-1:](x, emb)
        return self.out(x), taps


def random_unet(seed: int = 0, **shape: object) -> GuidedUNet:
    """Return a reference without zero parameters.

    The real initialisation with zeros would hide every attention block.
    """
    unet = GuidedUNet(**shape).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.normal_(0, 1 / math.sqrt(max(1, parameter[0].numel())), generator=generator)
            if "qkv" in name:
                parameter.mul_(2)  # sharp attention reveals a wrong row order
    return unet


def published(name: str, width: int, **changes: object) -> dict[str, object]:
    """Return the shape of a published model, per its README's flags, with another width."""
    shapes: dict[str, dict[str, object]] = {
        "adm-64": {
            "mult": (1, 2, 3, 4),
            "blocks": 3,
            "attention": (2, 4, 8),
            "head_channels": 64,
            "new_order": True,
        },
        "adm-128": {"mult": (1, 1, 2, 3, 4), "blocks": 2, "attention": (4, 8, 16), "heads": 4},
        "adm-256": {
            "mult": (1, 1, 2, 2, 4, 4),
            "blocks": 2,
            "attention": (8, 16, 32),
            "head_channels": 64,
        },
        "adm-512": {
            "mult": (0.5, 1, 1, 2, 2, 4, 4),
            "blocks": 2,
            "attention": (16, 32, 64),
            "head_channels": 64,
        },
    }
    return {"width": width, **shapes[name], **changes}


def small(name: str, **changes: object) -> dict[str, object]:
    """Return the same shape with few channels.

    At 512 px the timestep embedding needs the full base width, so the levels shrink instead.
    """
    if name == "adm-512":
        return published(
            name, 256, mult=(0.5, *[0.125] * 3, *[0.25] * 3), head_channels=16, **changes
        )
    return published(name, 32, **({} if name == "adm-128" else {"head_channels": 16}), **changes)
