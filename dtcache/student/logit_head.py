"""The student's logit head: from a backbone's maps to class logits, kept beside the backbone to start others from.

Shapes: B batch, C channels, H rows, W columns, K classes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dtcache.atomic_files import make_folders, write_file
from dtcache.errors import ConfigError
from dtcache.options.train import REGRESSORS
from dtcache.recipe import Json
from dtcache.student.pyramid import SimplePyramid
from dtcache.student.regressor import FeatureRegressor
from dtcache.student.student import Student
from dtcache.student.weights_io import (
    CONFIG,
    WEIGHTS,
    bounded,
    load_weights,
    read_config,
    weight_bytes,
)

KIND = "dtcache logit head 1"
AGAIN = "train with --labels again"
MAX_WIDTH = 4096
MAX_MAPS = 16

Map = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSpec:
    """What a head is built from."""

    classes: tuple[str, ...]
    """Names by number."""
    shapes: tuple[Map, ...]
    """(C, H, W) of the backbone's maps, finest first."""
    grid: tuple[int, int]
    """(H, W) of the logits."""
    width: int
    """Channels of the pyramid."""
    regressor: str
    """Its kind, of REGRESSORS."""
    input_size: tuple[int, int]
    """(height, width) of the backbone's input."""


class LogitHead(nn.Module):
    """The part of a student's regressor that its logits take: pyramid, smoothing, and the last 1x1 convolution."""

    def __init__(self, spec: HeadSpec) -> None:
        """Make a head with random weights."""
        super().__init__()
        shapes = list(spec.shapes)
        self.pyramid = None
        if len(shapes) == 1:
            self.pyramid = SimplePyramid(shapes[0][0], spec.input_size[0] / shapes[0][1])
            with torch.no_grad():
                like = next(self.pyramid.parameters())
                found = self.pyramid(torch.zeros(1, *shapes[0], device=like.device))
            shapes = [(x.shape[1], x.shape[2], x.shape[3]) for x in found]
        target = {"logits": (len(spec.classes), *spec.grid)}
        channels = [c for c, _, _ in shapes]
        grids = [(h, w) for _, h, w in shapes]
        self.regressor = FeatureRegressor(channels, grids, target, spec.width, spec.regressor)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K, H, W) on the grid, of a backbone's maps."""
        found: Tensor = self.regressor(maps if self.pyramid is None else self.pyramid(maps[-1]))[
            "logits"
        ]
        return found


def logit_head(student: Student, target: str, spec: HeadSpec) -> LogitHead:
    """Return the head of a student's target, with the student's weights."""
    head = LogitHead(spec)
    place = list(student.regressor.level_of).index(target)
    weights = student.state_dict()
    own = {
        name: name.replace("regressor.heads.0.", f"regressor.heads.{place}.")
        for name in head.state_dict()
    }
    head.load_state_dict({name: weights[theirs] for name, theirs in own.items()})
    return head.eval()


def save_head(head: LogitHead, spec: HeadSpec, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`. Raises DiskError."""
    make_folders(folder)
    write_file(folder / WEIGHTS, weight_bytes(head))
    write_file(folder / CONFIG, json.dumps({"kind": KIND, **asdict(spec)}, indent=1).encode())


def load_head(
    folder: Path, shapes: Sequence[Map], input_size: tuple[int, int]
) -> tuple[LogitHead, HeadSpec]:
    """Read a folder of `save_head` for a backbone whose maps have these shapes, at this input size.

    The grid of the logits grows and shrinks with the maps. Raises ConfigError where a part is missing, is out of bounds
    or does not fit the backbone, and for a head of whole images.
    """
    config = read_config(
        folder / CONFIG, expected="the head of a run of dtcache train --labels", again=AGAIN
    )
    try:
        kept = _spec(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{folder / CONFIG}: not the configuration of a head ({error}); {AGAIN}"
        ) from error
    if kept.grid == (1, 1):
        raise ConfigError(
            f"{folder}: expected a head of pixels' labels, got one of whole images; give another head"
        )
    channels = [[c for c, _, _ in maps] for maps in (kept.shapes, shapes)]
    if channels[0] != channels[1]:
        raise ConfigError(
            f"{folder}: expected the backbone of its own run, with maps of {_listed(channels[0])} channels, got "
            f"{_listed(channels[1])}; give that run's backbone"
        )
    grid = tuple(
        max(1, g * new // old)
        for g, new, old in zip(kept.grid, shapes[0][1:], kept.shapes[0][1:], strict=True)
    )
    spec = HeadSpec(
        classes=kept.classes,
        shapes=tuple(shapes),
        grid=(grid[0], grid[1]),
        width=kept.width,
        regressor=kept.regressor,
        input_size=input_size,
    )
    return load_weights(
        folder / WEIGHTS, lambda: LogitHead(spec), title="this head", again=AGAIN
    ), spec


def _spec(config: Json) -> HeadSpec:
    if config.get("kind") != KIND or config["regressor"] not in REGRESSORS:
        raise ValueError(
            f"kind {str(config.get('kind'))[:40]!r} with a regressor {str(config['regressor'])[:40]!r}"
        )
    classes = config["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are not names")
    bounded(len(classes))
    bounded(len(config["shapes"]), MAX_MAPS)
    shapes = [tuple(map(bounded, shape)) for shape in config["shapes"]]
    grid, size = (tuple(map(bounded, config[name])) for name in ("grid", "input_size"))
    if {len(shape) for shape in shapes} != {3} or len(grid) != 2 or len(size) != 2:
        raise ValueError("its shapes are not (channels, height, width)")
    return HeadSpec(
        classes=tuple(classes),
        shapes=tuple((c, h, w) for c, h, w in shapes),
        grid=(grid[0], grid[1]),
        width=bounded(config["width"], MAX_WIDTH),
        regressor=config["regressor"],
        input_size=(size[0], size[1]),
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
