"""The student's backbone: an unmodified timm network, its pyramid, its folder. The only place that imports timm."""

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import split_model_name_tag
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dtcache.errors import ConfigError
from dtcache.spec import Json, ViewSpec
from dtcache.storage import write_file

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_SIDE = 1 << 14
"""Pixels a side that a folder's configuration may ask for."""
FINEST_REDUCTION = 4

Rgb = tuple[float, float, float]


class Backbone(nn.Module):
    """A timm network without its classifier, as the pyramid that a regressor reads."""

    def __init__(self, model: nn.Module, *, mean: Rgb, std: Rgb) -> None:
        """Wrap `model`, whose inputs are normalised by `mean` and `std` (of pixels in [0, 1]).

        Raises ConfigError where the network has no pyramid.
        """
        super().__init__()
        self.model = model
        self.mean, self.std = mean, std
        timm_config = cast(Any, model).pretrained_cfg
        self.name = str(timm_config["architecture"])
        self._fixed_size = bool(timm_config.get("fixed_input_size", False))
        levels = _pyramid(self.name, model)
        self._indices = [index for index, _, _ in levels]
        self.channels = [channels for _, channels, _ in levels]
        self.reductions = [reduction for _, _, reduction in levels]

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the maps (B, channels[i], H / reductions[i], W / reductions[i]) of normalised images, finest first.

        Raises ConfigError where the network serves one input size only, and it is another one.
        """
        self._require_size(images_BCHW)
        maps: list[Tensor] = cast(Any, self.model).forward_intermediates(
            images_BCHW, indices=self._indices, intermediates_only=True, output_fmt="NCHW"
        )
        return maps

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """Return the network's own pooled features (B, D) of normalised images. Raises as `forward` does."""
        self._require_size(images_BCHW)
        return cast(Tensor, self.model(images_BCHW))

    def _require_size(self, images_BCHW: Tensor) -> None:
        size = tuple(images_BCHW.shape[2:])
        if self._fixed_size and size != self.default_size:
            raise ConfigError(
                f"{self.name}: expected images of {self.default_size[0]}x{self.default_size[1]} pixels, the only size "
                f"that it serves, got {size[0]}x{size[1]}; give that size or choose another backbone"
            )

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that timm names for this network."""
        _, height, width = cast(Any, self.model).pretrained_cfg["input_size"]
        return int(height), int(width)

    @property
    def fresh_batch_norms(self) -> list[_BatchNorm]:
        """Batch normalisations that have seen no batch: their running statistics are still 0 and 1.

        The counter alone does not tell: weights saved without it load as 0.
        """
        return [norm for norm in _batch_norms(self) if _is_fresh(norm)]


def make_backbone(name: str, *, init: str | None, seed: int) -> Backbone:
    """Make a backbone by its timm name.

    `init`: None for random weights, a function of `seed`; "pretrained" for timm's; else a folder of `save_backbone`.
    Raises ConfigError for an unknown name, a network without a pyramid, or an `init` that does not serve.
    """
    _require_known(name)
    if init not in (None, "pretrained"):
        loaded, _, _ = load_backbone(Path(init))
        if loaded.name != split_model_name_tag(name)[0]:
            raise ConfigError(f"--init {init}: expected a backbone of {name}, got one of {loaded.name}")
        return loaded
    from huggingface_hub.errors import HfHubHTTPError

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, pretrained=init == "pretrained", num_classes=0)
        except (RuntimeError, ValueError, OSError, HfHubHTTPError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"timm cannot make {name} with {init or 'random'} weights ({reason}); check the name's tag and the "
                "network, or leave --init out"
            ) from error
    timm_config = cast(Any, model).pretrained_cfg
    return Backbone(model, mean=_rgb(timm_config["mean"]), std=_rgb(timm_config["std"]))


def save_backbone(backbone: Backbone, folder: Path, *, input_size: tuple[int, int], view: ViewSpec) -> None:
    """Write `model.safetensors` and `config.json`, which timm reads as `local-dir:FOLDER` with pretrained=True.

    `input_size` (height, width) and `view` are what the backbone was trained with. Raises DiskError.
    """
    timm_config = cast(Any, backbone.model).pretrained_cfg
    config: Json = {
        "architecture": backbone.name,
        "num_classes": 0,
        "pretrained_cfg": {
            # Equal numbers of classes, here and asked for, are what makes timm load strictly.
            "num_classes": 0,
            "input_size": [3, *input_size],
            "fixed_input_size": backbone._fixed_size,
            "crop_pct": 1.0,
            "crop_mode": "squash" if view.fit == "stretch" else "center",
            "interpolation": "bicubic",
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "first_conv": timm_config.get("first_conv"),
            "classifier": timm_config.get("classifier"),
        },
        "dtcache": {"view": {"height": view.height, "width": view.width, "fit": view.fit}},
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in backbone.model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / WEIGHTS, safetensors.torch.save(weights, {"format": "pt"}))
    write_file(folder / CONFIG, json.dumps(config, indent=1).encode())


def load_backbone(folder: Path) -> tuple[Backbone, tuple[int, int], ViewSpec | None]:
    """Read a folder of `save_backbone`: the backbone, its input size (height, width) and the view it was trained with.

    Reads JSON and safetensors only. Raises ConfigError where a part is missing, does not fit or is out of bounds.
    """
    config = _read_config(folder / CONFIG)
    try:
        name, cfg = config["architecture"], config["pretrained_cfg"]
        if not isinstance(name, str) or name not in timm.list_models():
            raise ValueError(f"architecture {str(name)[:60]!r} is none of timm {timm.__version__}")
        channels, *sides = cfg["input_size"]
        if channels != 3:
            raise ValueError(f"input_size {cfg['input_size']} is not (3, height, width)")
        input_size = _side(sides[0]), _side(sides[1])
        mean, std = _rgb(cfg["mean"]), _rgb(cfg["std"])
        if min(std) <= 0:
            raise ValueError(f"std {std} is not positive")
        view = _view(config.get("dtcache"))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"{folder / CONFIG}: not the configuration of a backbone ({error}); expected one written by dtcache train"
        ) from error
    path = folder / WEIGHTS
    if not path.is_file():
        raise ConfigError(f"{path}: the weights are missing; expected the folder that dtcache train wrote")
    model = timm.create_model(name, num_classes=0)
    try:
        model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path}: not the weights of {name} ({reason}); export the backbone again") from error
    return Backbone(model, mean=mean, std=std), input_size, view


def student_input(images_BCHW: Tensor, input_size: tuple[int, int], mean: Rgb, std: Rgb) -> Tensor:
    """Turn uint8 views into a backbone's input: fp32 (B, 3, *input_size), resized bilinearly where the size differs.

    Antialiased only where a side shrinks.
    """
    x_BCHW = images_BCHW.float() / 255
    size = x_BCHW.shape[2:]
    if tuple(size) != input_size:
        shrinks = input_size[0] < size[0] or input_size[1] < size[1]
        x_BCHW = F.interpolate(x_BCHW, input_size, mode="bilinear", align_corners=False, antialias=shrinks)
    mean_C11, std_C11 = (x_BCHW.new_tensor(value)[:, None, None] for value in (mean, std))
    return (x_BCHW - mean_C11) / std_C11


@torch.no_grad()
def recalibrate_batch_norm(
    backbone: Backbone, batches: Iterable[Tensor], norms: Sequence[_BatchNorm] | None = None
) -> None:
    """Set running statistics of `norms` [default: all] to their average over batches of normalised images (B, 3, H, W).

    Everything else stays in evaluation mode; a network without batch normalisation draws no batch.
    """
    norms = _batch_norms(backbone) if norms is None else norms
    if not norms:
        return
    training, momenta = backbone.training, [norm.momentum for norm in norms]
    backbone.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    try:
        for images_BCHW in batches:
            backbone.pooled(images_BCHW)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        backbone.train(training)


def _batch_norms(backbone: Backbone) -> list[_BatchNorm]:
    return [m for m in backbone.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _is_fresh(norm: _BatchNorm) -> bool:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None, "only norms that track statistics are asked about"
    return not norm.num_batches_tracked and not mean.any() and bool((var == 1).all())


def _require_known(name: str) -> None:
    """Raise ConfigError, with the closest names, where timm has no such network; a tag may follow a dot."""
    known = timm.list_models()
    if split_model_name_tag(name)[0] in known:
        return
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them, resnet50 is one"
    raise ConfigError(f"{name[:80]}: timm {timm.__version__} has no network of this name; {hint}")


def _pyramid(name: str, model: nn.Module) -> list[tuple[int, int, int]]:
    """Return (index, channels, reduction) of the stages that a regressor can read, finest first."""
    info: list[Json] = cast(Any, getattr(model, "feature_info", None) or [])
    levels = [
        (index, int(level["num_chs"]), int(level["reduction"]))
        for index, level in enumerate(info)
        if level["reduction"] >= FINEST_REDUCTION
    ]
    reductions = [reduction for _, _, reduction in levels]
    rising = all(fine < coarse for fine, coarse in pairwise(reductions))
    if len(levels) < 2 or not rising or not hasattr(model, "forward_intermediates"):
        got = ", ".join(map(str, sorted(set(reductions)))) or "none"
        raise ConfigError(
            f"{name}: expected a backbone with a feature pyramid (stages at strides such as 4, 8, 16, 32), got strides "
            f"{got}; choose one such as resnet50 or convnext_tiny"
        )
    return levels


def _read_config(path: Path) -> Json:
    if not path.is_file():
        raise ConfigError(f"{path}: missing; expected a backbone folder written by dtcache train, such as RUN/backbone")
    if path.stat().st_size >= MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: expected less than {MAX_CONFIG_BYTES} bytes of JSON, got {path.stat().st_size}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); export the backbone again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}; export the backbone again")
    return value


def _rgb(values: Any) -> Rgb:
    red, green, blue = (float(value) for value in values)
    if not all(math.isfinite(value) for value in (red, green, blue)):
        raise ValueError(f"{values} are not three finite numbers")
    return red, green, blue


def _side(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIDE:
        raise ValueError(f"a side of {value!r} is not a number of pixels from 1 to {MAX_SIDE}")
    return value


def _view(ours: Any) -> ViewSpec | None:
    """Return the view that a configuration records; None where it is not dtcache's."""
    if ours is None:
        return None
    view = ours["view"]
    if view["fit"] not in ("crop", "stretch"):
        raise ValueError(f"fit {view['fit']!r} is neither crop nor stretch")
    return ViewSpec(height=_side(view["height"]), width=_side(view["width"]), fit=view["fit"])
