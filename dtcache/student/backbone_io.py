"""Backbones built from timm names, and saved in folders that timm reads."""

import difflib
import json
import math
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import split_model_name_tag
from torch import nn

from dtcache.atomic_files import make_folders, write_file
from dtcache.errors import ConfigError
from dtcache.recipe import Json, ViewSpec
from dtcache.student.backbone import Backbone, Rgb
from dtcache.student.weights_io import (
    CONFIG,
    WEIGHTS,
    bounded,
    load_weights,
    read_config,
    read_view,
    weight_bytes,
)


def make_backbone(
    name: str, *, init: str | None, seed: int, size: tuple[int, int] | None = None
) -> Backbone:
    """Build a backbone from its timm name.

    A network that takes one input size only is built for `size` (H, W). `init` is None for random
    weights, a function of `seed`; "pretrained" for timm's weights; else a folder written by
    `save_backbone`. Raises ConfigError for an unknown name, a network without a pyramid, and an
    `init` or `size` that does not fit the network.
    """
    require_known(name)
    if init not in (None, "pretrained"):
        loaded, _, _ = load_backbone(Path(init))
        if loaded.name != split_model_name_tag(name)[0]:
            raise ConfigError(
                f"`init` {init}: expected a backbone of {name}, got one of {loaded.name}; pass a "
                "backbone of the same network"
            )
        return loaded
    from huggingface_hub.errors import HfHubHTTPError

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(
                name, pretrained=init == "pretrained", num_classes=0, **_sized(name, size)
            )
        except (
            RuntimeError,
            ValueError,
            OSError,
            AssertionError,
            TypeError,
            HfHubHTTPError,
        ) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            at = f" at {size[0]}x{size[1]} pixels" if size else ""
            other = ", or leave `init` out" if init else ""
            raise ConfigError(
                f"timm cannot make {name} with {init or 'random'} weights{at} ({reason}); check "
                f"the name's tag, the network and the size{other}"
            ) from error
    timm_config = cast(Any, model).pretrained_cfg
    return Backbone(model, mean=_rgb(timm_config["mean"]), std=_rgb(timm_config["std"]), size=size)


def save_backbone(
    backbone: Backbone, folder: Path, *, input_size: tuple[int, int], view: ViewSpec
) -> None:
    """Write a backbone's `model.safetensors` and `config.json`.

    timm reads the folder as `local-dir:FOLDER` with pretrained=True. `input_size` (height, width)
    and `view` describe the training. Raises DiskError.
    """
    timm_config = cast(Any, backbone.model).pretrained_cfg
    config: Json = {
        "architecture": backbone.name,
        "num_classes": 0,
        "pretrained_cfg": {
            # timm loads strictly only if this number equals the number of classes in the call.
            "num_classes": 0,
            "input_size": [3, *input_size],
            "fixed_input_size": backbone.fixed_size,
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
    if backbone.fixed_size:
        config["model_args"] = {"img_size": list(backbone.default_size)}
    make_folders(folder)
    write_file(folder / WEIGHTS, weight_bytes(backbone.model))
    write_file(folder / CONFIG, json.dumps(config, indent=1).encode())


def load_backbone(folder: Path) -> tuple[Backbone, tuple[int, int], ViewSpec | None]:
    """Read a folder of `save_backbone`.

    Returns the backbone, and the input size (height, width) and the view of its training. The view
    is None if the folder records none. Reads JSON and safetensors only. Raises ConfigError if a
    file is missing, does not fit or is out of bounds.
    """
    config = read_config(
        folder / CONFIG,
        expected="a backbone folder written by dtcache train, such as RUN/backbone",
        again="export the backbone again",
    )
    try:
        name = config["architecture"]
        cfg = config["pretrained_cfg"]
        if not isinstance(name, str) or name not in timm.list_models():
            raise ValueError(
                f"architecture {str(name)[:60]!r} is not a network of timm {timm.__version__}"
            )
        channels, *sides = cfg["input_size"]
        if channels != 3:
            raise ValueError(f"input_size {cfg['input_size']} is not (3, height, width)")
        input_size = bounded(sides[0]), bounded(sides[1])
        mean = _rgb(cfg["mean"])
        std = _rgb(cfg["std"])
        if min(std) <= 0:
            raise ValueError(f"std {std} is not positive")
        view = read_view(config["dtcache"]["view"]) if "dtcache" in config else None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"{folder / CONFIG}: not the configuration of a backbone ({error}); expected one "
            "written by dtcache train"
        ) from error
    model = load_weights(
        folder / WEIGHTS,
        lambda: timm.create_model(name, num_classes=0, **_sized(name, input_size)),
        title=name,
        again="export the backbone again",
    )
    return Backbone(model, mean=mean, std=std, size=input_size), input_size, view


def open_in_timm(folder: Path) -> nn.Module:
    """Return the network that timm builds from a backbone's folder, loaded strictly."""
    # Without pretrained=True timm returns random weights without a warning.
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)


def _sized(name: str, size: tuple[int, int] | None) -> Json:
    """Return the arguments with which timm builds a network for an input size (H, W).

    They are empty unless the network takes one input size only.
    """
    known = timm.models.get_pretrained_cfg(split_model_name_tag(name)[0], allow_unregistered=True)
    return (
        {"img_size": size}
        if size is not None and known is not None and known.fixed_input_size
        else {}
    )


def require_known(name: str) -> None:
    """Raise ConfigError, with the closest names, if timm has no such network.

    A dot and a tag may follow the name.
    """
    known = timm.list_models()
    if split_model_name_tag(name)[0] in known:
        return
    close = difflib.get_close_matches(name, known, n=3)
    hint = (
        f"did you mean {', '.join(close)}?"
        if close
        else "timm.list_models() lists them, resnet50 is one"
    )
    raise ConfigError(f"{name[:80]}: timm {timm.__version__} has no network of this name; {hint}")


def _rgb(values: Any) -> Rgb:
    red, green, blue = (float(value) for value in values)
    if not all(math.isfinite(value) for value in (red, green, blue)):
        raise ValueError(f"{values} are not three finite numbers")
    return red, green, blue
