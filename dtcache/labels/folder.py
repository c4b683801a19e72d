"""An interpreter's folder: what it was fitted to, as JSON, and its weights, as safetensors."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dtcache.atomic_files import write_file
from dtcache.errors import CacheMismatchError, ConfigError
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
"""Of whole images."""
SCORES = ("images", "miou", "accuracy")
TEACHER = ("architecture", "weights_sha256", "config_sha256", "ddim_steps", "condition")
"""What of a teacher an interpreter hangs on, beside the arrays that it reads."""

Level = Literal["pixel", "image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InterpreterSpec:
    """What an interpreter gives, and the features that it was fitted to."""

    level: Level
    """Whether it labels pixels, or images as a whole."""
    classes: tuple[str, ...]
    """Names by number."""
    width: int
    """Channels of its fuse layers."""
    shapes: dict[str, tuple[int, int, int]]
    """(C, H, W) by array, such as t50/stride8: timestep by timestep, finest tap first."""
    view: ViewSpec
    teacher: Json
    """The fields TEACHER of the cache's recipe; None where it has none."""
    validation: Json | None
    """Scores on the masked images that were held out, if any: `images`, `miou`, `accuracy`."""

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of its logits."""
        return (1, 1) if self.level == "image" else logit_grid(self.shapes, self.view)

    def build(self) -> FeatureInterpreter:
        """Return the network, with random weights."""
        return FeatureInterpreter(self.shapes, len(self.classes), width=self.width, grid=self.grid)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpreter:
    """An interpreter, read back."""

    spec: InterpreterSpec
    network: FeatureInterpreter
    """In evaluation mode, on the CPU."""
    weights_sha256: str
    config_sha256: str


def teacher_identity(recipe: Json) -> Json:
    """Return what of a cache's teacher an interpreter hangs on."""
    return {name: recipe["teacher"].get(name) for name in TEACHER}


def save_interpreter(network: FeatureInterpreter, spec: InterpreterSpec, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`. Raises DiskError."""
    write_file(folder / WEIGHTS, weight_bytes(network))
    write_file(folder / CONFIG, json.dumps({"kind": KIND, **asdict(spec)}, indent=1).encode())


def load_interpreter(folder: Path) -> Interpreter:
    """Read a folder of `save_interpreter`. Raises ConfigError where a part is missing, does not fit or is too large."""
    config = read_config(folder / CONFIG, expected="the --out of dtcache label fit", again=AGAIN)
    try:
        spec = _spec(config)
        network = load_weights(folder / WEIGHTS, spec.build, title="this interpreter", again=AGAIN)
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{folder / CONFIG}: not the configuration of an interpreter ({error}); {AGAIN}"
        ) from error
    hashes = [file_sha256(folder / name) for name in (WEIGHTS, CONFIG)]
    return Interpreter(
        spec=spec, network=network.eval(), weights_sha256=hashes[0], config_sha256=hashes[1]
    )


def require_serves(spec: InterpreterSpec, where: Path, recipe: Json, shapes: Shapes) -> None:
    """Raise CacheMismatchError, naming the difference, where a cache's features are not those it was fitted to."""
    differences = [
        (f"teacher {name}", spec.teacher[name], found)
        for name, found in teacher_identity(recipe).items()
        if found != spec.teacher[name]
    ]
    view = {"height": spec.view.height, "width": spec.view.width, "fit": spec.view.fit}
    differences += [("view", view, recipe["view"])] if recipe["view"] != view else []
    for part, what in enumerate(("timesteps", "taps")):
        wanted, found = (
            sorted({name.split("/")[part] for name in names}) for names in (spec.shapes, shapes)
        )
        differences += (
            [(what, ", ".join(wanted), ", ".join(found))] if not set(wanted) <= set(found) else []
        )
    differences += [
        (f"shape of {name}", shape, shapes[name])
        for name, shape in spec.shapes.items()
        if name in shapes and shapes[name] != shape
    ]
    if differences:
        what, wanted, found = differences[0]
        raise CacheMismatchError(
            f"{where}: the interpreter was fitted to other features: {what} is {_short(found)} in the cache, the "
            f"interpreter expects {_short(wanted)}; give the cache that it was fitted to, or fit one to this"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _spec(config: Json) -> InterpreterSpec:
    """Return a configuration, checked. Raises KeyError, TypeError, ValueError or AttributeError."""
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
        raise ValueError(f"level {str(level)[:40]!r} or its classes are not such")
    bounded(len(classes), 256 if level == "pixel" else MAX_CLASSES)
    shapes = {str(name): tuple(map(bounded, shape)) for name, shape in config["shapes"].items()}
    bounded(len(shapes), MAX_MAPS)
    if not all(len(shape) == 3 and name.count("/") == 1 for name, shape in shapes.items()):
        raise ValueError("its shapes are not (channels, height, width) by array")
    if not isinstance(config["teacher"], dict) or set(config["teacher"]) != set(TEACHER):
        raise ValueError("its teacher is not named")
    if validation is not None:
        check_scores(validation)
    if bounded(config["width"], MAX_WIDTH) % GROUPS:
        raise ValueError(f"a width of {config['width']} is no multiple of {GROUPS}")
    return InterpreterSpec(
        level=level,
        classes=tuple(classes),
        width=config["width"],
        shapes={name: (shape[0], shape[1], shape[2]) for name, shape in shapes.items()},
        view=read_view(config["view"]),
        teacher=config["teacher"],
        validation=validation,
    )
