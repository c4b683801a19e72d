"""The feature regressor: from a backbone's pyramid to the teacher's maps.

The paper's regressor is an FPN and a 1x1 convolution per tap. Shapes: B batch, C channels, H rows,
W columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtcache.arguments import list_of, require, require_count
from dtcache.errors import ConfigError
from dtcache.options.train import REGRESSORS
from dtcache.student.blocks import BottomUp, ConvBlock, NonLocal, PyramidPooling, resize


def require_targets(targets: Mapping[str, tuple[int, int, int]]) -> None:
    """Raise ConfigError unless `targets` holds a shape (C, H, W) of positive integers by name."""
    require("targets", targets, Mapping, "shapes (C, H, W) by array")
    if not targets:
        raise ConfigError("`targets`: expected one or more arrays, got none; pass their shapes")
    for name, shape in targets.items():
        sides = shape if isinstance(shape, tuple | list) else ()
        if len(sides) != 3 or not all(isinstance(n, Integral) and n > 0 for n in sides):
            raise ConfigError(
                f"`targets` {name}: expected (C, H, W), three integers over 0, got {shape!r}; pass "
                "cache.shape(name)"
            )


class FeatureRegressor(nn.Module):
    """A feature pyramid network with one 1x1 convolution (head) per target.

    A head reads the level that has the target's grid. If a target is coarser than every level,
    max-pooled levels are added. If no level has the target's grid, the target is predicted on the
    next finer level and resized bilinearly; `resized` names such targets. A level without a target
    has no head.

    Four kinds, as in the paper's ablation: `fpn`; `fpn-attention`, with a non-local block on the
    coarsest level; `pafpn`, followed by PANet's bottom-up branch; `fpn-ppm`, with pyramid pooling
    instead of the 1x1 convolution of the coarsest level.
    """

    def __init__(
        self,
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        targets: Mapping[str, tuple[int, int, int]],
        width: int,
        kind: str = "fpn-ppm",
    ) -> None:
        """Predict `targets` (C, H, W) from maps of `channels` on `grids` (H, W), finest first.

        `width` is the number of channels of the pyramid. Raises ConfigError for a wrong argument.
        """
        super().__init__()
        require_targets(targets)
        require_count("width", width, 1)
        if kind not in REGRESSORS:
            raise ConfigError(
                f"`regressor` {kind!r}: expected one of {', '.join(REGRESSORS)}; use fpn-ppm"
            )
        channels = list_of("channels", channels, Integral, "integers")
        if not channels:
            raise ConfigError("`channels`: expected one or more maps, got none; pass the channels")
        if len(grids) != len(channels):
            raise ConfigError(
                f"`grids`: expected {len(channels)} pairs (H, W), one per map of `channels`, got "
                f"{len(grids)}; pass as many"
            )
        self._names = list(targets)
        self._sizes = {name: (h, w) for name, (_, h, w) in targets.items()}
        levels = list(grids)
        while min(h for h, _ in self._sizes.values()) < levels[-1][0] and min(levels[-1]) > 1:
            levels.append((-(-levels[-1][0] // 2), -(-levels[-1][1] // 2)))
        self._extra = len(levels) - len(grids)
        self.level_of = {name: _level(levels, size) for name, size in self._sizes.items()}
        self.resized = [
            name for name in self._names if levels[self.level_of[name]] != self._sizes[name]
        ]

        # Keep this order: initial weights depend on the seed and on the order of construction.
        self.pooling = PyramidPooling(channels[-1], width) if kind == "fpn-ppm" else None
        self.laterals = nn.ModuleList(
            ConvBlock(c, width, 1)
            for c in (channels[:-1] if self.pooling is not None else channels)
        )
        self.attention = NonLocal(width) if kind == "fpn-attention" else None
        used = sorted(set(self.level_of.values()))
        if kind == "pafpn":
            # The branch starts at the finest level, even if that level has no target.
            used = list(range(used[-1] + 1))
        self.smooth = nn.ModuleDict({str(level): ConvBlock(width, width, 3) for level in used})
        self.bottom_up = BottomUp(len(used), width) if kind == "pafpn" else None
        self.heads = nn.ModuleList(_heads(targets, width))

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return predictions (B, C, H, W) of whitened teacher features by target.

        `maps` are those of the backbone, finest first.
        """
        levels = [self._coarsest(maps[-1])]
        for lateral, x_BCHW in zip(
            reversed(self.laterals[: len(maps) - 1]), reversed(maps[:-1]), strict=True
        ):
            levels.insert(0, lateral(x_BCHW) + resize(levels[0], x_BCHW.shape[2:]))
        for _ in range(self._extra):
            levels.append(F.max_pool2d(levels[-1], 2, ceil_mode=True))
        smoothed = {level: block(levels[int(level)]) for level, block in self.smooth.items()}
        if self.bottom_up is not None:
            smoothed = dict(zip(smoothed, self.bottom_up(list(smoothed.values())), strict=True))
        return {
            name: resize(head(smoothed[str(self.level_of[name])]), self._sizes[name])
            for name, head in zip(self._names, self.heads, strict=True)
        }

    def _coarsest(self, x_BCHW: Tensor) -> Tensor:
        top_BCHW: Tensor = (
            self.pooling(x_BCHW) if self.pooling is not None else self.laterals[-1](x_BCHW)
        )
        return self.attention(top_BCHW) if self.attention is not None else top_BCHW


def _heads(targets: Mapping[str, tuple[int, int, int]], width: int) -> Iterator[nn.Conv2d]:
    """Yield the head of each target, with random weights.

    The heads of every teacher, whose name precedes timestep and tap, start from the same random
    state: they do not depend on the other teachers.
    """
    state = torch.get_rng_state()
    before = None
    for name, (channels, _, _) in targets.items():
        teacher = name.rpartition("/")[0].rpartition("/")[0]
        if teacher != before and before is not None:
            torch.set_rng_state(state)
        before = teacher
        yield nn.Conv2d(width, channels, 1)


def _level(levels: Sequence[tuple[int, int]], size: tuple[int, int]) -> int:
    """Return the level of this grid, else the coarsest finer level, else the finest level."""
    if size in levels:
        return levels.index(size)
    finer = [i for i, (h, w) in enumerate(levels) if h >= size[0] and w >= size[1]]
    return max(finer, default=0)
