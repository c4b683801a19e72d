"""The student's logit head, from a backbone's maps to class logits, and its folder.

Segmentation heads start from its weights. Shapes: B batch, C channels, H rows, W columns, K
classes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from dtcache.atomic_files import make_folders, write_file
from dtcache.errors import ConfigError, WeightsError
from dtcache.options.train import REGRESSORS
from dtcache.recipe import Json
from dtcache.student.pyramid import MapShape, pyramid_for
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
AGAIN = "train with `labels` again"
MAX_WIDTH = 4096
MAX_MAPS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSpec:
    """The architecture of a head."""

    classes: tuple[str, ...]
    """Names by class number."""
    shapes: tuple[MapShape, ...]
    """(C, H, W) of the backbone's maps, finest first."""
    grid: tuple[int, int]
    """(H, W) of the logits."""
    width: int
    """Channels of the pyramid."""
    regressor: str
    """Kind of the regressor, one of REGRESSORS."""
    input_size: tuple[int, int]
    """(height, width) of the backbone's input."""


class LogitHead(nn.Module):
    """The part of a student's regressor that computes logits: pyramid, smoothing, 1x1 head."""

    def __init__(self, spec: HeadSpec) -> None:
        """Make a head with random weights."""
        super().__init__()
        self.pyramid, shapes = pyramid_for(spec.shapes, spec.input_size)
        target = {"logits": (len(spec.classes), *spec.grid)}
        channels = [c for c, _, _ in shapes]
        grids = [(h, w) for _, h, w in shapes]
        self.regressor = FeatureRegressor(channels, grids, target, spec.width, spec.regressor)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K, H, W) on the spec's grid from a backbone's maps, finest first."""
        levels = maps if self.pyramid is None else self.pyramid(maps[-1])
        logits: Tensor = self.regressor(levels)["logits"]
        return logits


def logit_head(student: Student, target: str, spec: HeadSpec) -> LogitHead:
    """Return the head of one of a student's targets, with the student's weights."""
    head = LogitHead(spec)
    index = list(student.regressor.level_of).index(target)
    weights = student.state_dict()
    source_of = {
        name: name.replace("regressor.heads.0.", f"regressor.heads.{index}.")
        for name in head.state_dict()
    }
    head.load_state_dict({name: weights[source] for name, source in source_of.items()})
    return head.eval()


def save_head(head: LogitHead, spec: HeadSpec, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`. Raises DiskError."""
    make_folders(folder)
    write_file(folder / WEIGHTS, weight_bytes(head))
    write_file(folder / CONFIG, json.dumps({"kind": KIND, **asdict(spec)}, indent=1).encode())


def load_head(
    folder: Path, shapes: Sequence[MapShape], input_size: tuple[int, int]
) -> tuple[LogitHead, HeadSpec]:
    """Read a folder of `save_head` for a backbone with maps of `shapes` at `input_size` (H, W).

    The grid of the logits scales with the maps. Raises ConfigError if the folder has no
    configuration, or if its head does not fit the backbone or predicts labels of images, and
    WeightsError if a file is malformed or out of bounds.
    """
    config = read_config(
        folder / CONFIG, expected="the head of a run of dtcache train with `labels`", again=AGAIN
    )
    try:
        saved = _spec(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{folder / CONFIG}: not the configuration of a head ({error}); {AGAIN}"
        ) from error
    if saved.grid == (1, 1):
        raise ConfigError(
            f"{folder}: expected a head for pixel labels, got one for image labels; pass another "
            "head"
        )
    channels = [[c for c, _, _ in maps] for maps in (saved.shapes, shapes)]
    if channels[0] != channels[1]:
        raise ConfigError(
            f"{folder}: expected the backbone of its own run, with maps of {_listed(channels[0])} "
            f"channels, got {_listed(channels[1])}; pass that run's backbone"
        )
    grid = tuple(
        max(1, g * new // old)
        for g, new, old in zip(saved.grid, shapes[0][1:], saved.shapes[0][1:], strict=True)
    )
    spec = HeadSpec(
        classes=saved.classes,
        shapes=tuple(shapes),
        grid=(grid[0], grid[1]),
        width=saved.width,
        regressor=saved.regressor,
        input_size=input_size,
    )
    return load_weights(
        folder / WEIGHTS, lambda: LogitHead(spec), title="this head", again=AGAIN
    ), spec


def _spec(config: Json) -> HeadSpec:
    if config.get("kind") != KIND or config["regressor"] not in REGRESSORS:
        raise ValueError(
            f"kind {str(config.get('kind'))[:40]!r} with a regressor "
            f"{str(config['regressor'])[:40]!r}"
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
