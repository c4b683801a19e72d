"""An interpreter's folder: its specification as JSON, its weights as safetensors."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dtcache.atomic_files import write_file
from dtcache.errors import CacheMismatchError, WeightsError
from dtcache.hashing import file_sha256
from dtcache.labels.interpreter import GROUPS, MAX_WIDTH, FeatureInterpreter, Shapes, logit_grid
from dtcache.recipe import Json, ViewSpec, check_scores
from dtcache.student.weights_io import (
    CONFIG,
    WEIGHTS,
    bounded,
    load_weights,
    read_config,
    read_view,
    weight_bytes,
)

KIND = "dtcache interpreter 1"
AGAIN = "fit it again with dtcache label fit"
MAX_MAPS = 64
MAX_CLASSES = 1 << 14
"""Most classes of image labels; pixel labels have at most 256."""
MAX_PIXEL_CLASSES = 256
SCORES = ("images", "miou", "accuracy")
TEACHER = ("architecture", "weights_sha256", "config_sha256", "ddim_steps", "condition")
"""Fields of a recipe's teacher that an interpreter depends on, in addition to its arrays."""

Level = Literal["pixel", "image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InterpreterSpec:
    """An interpreter's classes and architecture, and the features that it was fitted to."""

    level: Level
    """`pixel` for segmentation, `image` for labels of whole images."""
    classes: tuple[str, ...]
    """Names by number."""
    width: int
    """Channels of the fuse layers."""
    shapes: dict[str, tuple[int, int, int]]
    """(C, H, W) by array, such as t50/stride8: timestep by timestep, finest tap first."""
    view: ViewSpec
    teacher: Json
    """The fields TEACHER of the cache's recipe; None for a field that it lacks."""
    validation: Json | None
    """Scores on the held-out images, if any: `images`, `miou`, `accuracy`."""

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the logits."""
        return (1, 1) if self.level == "image" else logit_grid(self.shapes, self.view)

    def build(self) -> FeatureInterpreter:
        """Return the network, with random weights."""
        return FeatureInterpreter(self.shapes, len(self.classes), width=self.width, grid=self.grid)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpreter:
    """An interpreter read from its folder."""

    spec: InterpreterSpec
    network: FeatureInterpreter
    """In evaluation mode, on the CPU."""
    weights_sha256: str
    config_sha256: str


def teacher_identity(recipe: Json) -> Json:
    """Return the fields of a cache's teacher that an interpreter depends on."""
    return {name: recipe["teacher"].get(name) for name in TEACHER}


def save_interpreter(network: FeatureInterpreter, spec: InterpreterSpec, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`. Raises DiskError."""
    write_file(folder / WEIGHTS, weight_bytes(network))
    write_file(folder / CONFIG, json.dumps({"kind": KIND, **asdict(spec)}, indent=1).encode())


def load_interpreter(folder: Path) -> Interpreter:
    """Read a folder of `save_interpreter`.

    Raises ConfigError if the folder has no configuration, and WeightsError if a file is malformed
    or inconsistent with the other, or if a size is out of bounds.
    """
    config = read_config(
        folder / CONFIG, expected="an output folder of dtcache label fit", again=AGAIN
    )
    try:
        spec = _spec(config)
        network = load_weights(folder / WEIGHTS, spec.build, title="this interpreter", again=AGAIN)
    except WeightsError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{folder / CONFIG}: not the configuration of an interpreter ({error}); {AGAIN}"
        ) from error
    hashes = [file_sha256(folder / name) for name in (WEIGHTS, CONFIG)]
    return Interpreter(
        spec=spec, network=network.eval(), weights_sha256=hashes[0], config_sha256=hashes[1]
    )


def require_serves(spec: InterpreterSpec, root: Path, recipe: Json, shapes: Shapes) -> None:
    """Raise CacheMismatchError if the interpreter was fitted to other features.

    The message names the first difference. `recipe` and `shapes` describe the cache at `root`,
    which may have more taps and timesteps than the interpreter reads.
    """
    difference = next(_differences(spec, recipe, shapes), None)
    if difference is not None:
        name, expected, actual = difference
        raise CacheMismatchError(
            f"{root}: the interpreter was fitted to other features: {name} is {_short(actual)} in "
            f"the cache, the interpreter expects {_short(expected)}; pass the cache that it was "
            "fitted to, or fit an interpreter to this one"
        )


def _differences(
    spec: InterpreterSpec, recipe: Json, shapes: Shapes
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, the interpreter's value, the cache's value) of every difference."""
    for name, value in teacher_identity(recipe).items():
        if value != spec.teacher[name]:
            yield f"teacher {name}", spec.teacher[name], value
    view = {
        "height": spec.view.height,
        "width": spec.view.width,
        "resize_mode": spec.view.resize_mode,
    }
    if recipe["view"] != view:
        yield "view", view, recipe["view"]
    for position, name in enumerate(("timesteps", "taps")):
        own = {array.split("/")[position] for array in spec.shapes}
        cached = {array.split("/")[position] for array in shapes}
        if not own <= cached:
            yield name, ", ".join(sorted(own)), ", ".join(sorted(cached))
    for array, shape in spec.shapes.items():
        if array in shapes and shapes[array] != shape:
            yield f"shape of {array}", shape, shapes[array]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _spec(config: Json) -> InterpreterSpec:
    """Parse and check a configuration.

    Raises KeyError, TypeError, ValueError or AttributeError if it is malformed.
    """
    if config.get("kind") != KIND:
        raise ValueError(f"kind {str(config.get('kind'))[:40]!r}, expected {KIND!r}")
    level = config["level"]
    classes = config["classes"]
    validation = config["validation"]
    if (
        level not in ("pixel", "image")
        or not isinstance(classes, list)
        or not all(isinstance(c, str) for c in classes)
    ):
        raise ValueError(
            f"level {str(level)[:40]!r} is unknown, or its classes are not a list of names"
        )
    bounded(len(classes), MAX_PIXEL_CLASSES if level == "pixel" else MAX_CLASSES)
    shapes = {str(name): tuple(map(bounded, shape)) for name, shape in config["shapes"].items()}
    bounded(len(shapes), MAX_MAPS)
    if not all(len(shape) == 3 and name.count("/") == 1 for name, shape in shapes.items()):
        raise ValueError("its shapes are not (channels, height, width) by array")
    if not isinstance(config["teacher"], dict) or set(config["teacher"]) != set(TEACHER):
        raise ValueError("its teacher's fields are not those of an interpreter")
    if validation is not None:
        check_scores(validation)
    if bounded(config["width"], MAX_WIDTH) % GROUPS:
        raise ValueError(f"a width of {config['width']} is not a multiple of {GROUPS}")
    return InterpreterSpec(
        level=level,
        classes=tuple(classes),
        width=config["width"],
        shapes={name: (shape[0], shape[1], shape[2]) for name, shape in shapes.items()},
        view=read_view(config["view"]),
        teacher=config["teacher"],
        validation=validation,
    )
