"""Backbones in folders that timm reads: saved, and loaded with bounds."""

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import PretrainedCfg, split_model_name_tag
from torch import Tensor, nn

from dtcache.atomic_files import make_folders, write_file
from dtcache.errors import WeightsError
from dtcache.recipe import MAX_SIDE, Json, ViewSpec
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

OF_THE_CALL = {
    *inspect.signature(timm.create_model).parameters,
    *("pretrained_strict", "pretrained_filter_fn", "pretrained_custom_load"),
    *("pretrained_model_args", "features_only", "feature_cfg", "out_indices", "device", "dtype"),
}
"""Arguments that decide how timm builds a network and what it reads: no folder may set them."""
MAX_CLASSES = 1 << 20
EXPECTED = "a folder of a backbone that dtcache train or timm (save_for_hf) has written"
AGAIN = "export the backbone again"


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedBackbone:
    """The configuration of a backbone's folder, checked."""

    name: str
    classes: int
    """Outputs of the classifier that the weights include; 0 without a classifier."""
    input_size: tuple[int, int]
    mean: Rgb
    std: Rgb
    view: ViewSpec | None
    model_args: Json
    """Arguments of the network itself, without its size and its classes."""

    def make(self, size: tuple[int, int], classes: int) -> nn.Module:
        """Return the network with random weights for an input size (H, W)."""
        return timm.create_model(
            self.name, num_classes=classes, **sized(self.name, size), **self.model_args
        )

    def fill(self, weights: Mapping[str, Tensor], size: tuple[int, int]) -> nn.Module:
        """Return the network for an input size (H, W) with these weights, without a classifier.

        timm loads the weights strictly, and resamples what depends on the input size, such as
        position embeddings.
        """
        network = timm.create_model(
            self.name,
            pretrained=True,
            pretrained_cfg={
                "num_classes": self.classes,
                "input_size": (3, *size),
                "mean": self.mean,
                "std": self.std,
                "state_dict": dict(weights),
                **self._names,
            },
            num_classes=self.classes,
            **sized(self.name, size),
            **self.model_args,
        )
        if self.classes:
            cast(Any, network).reset_classifier(0)
            plain = self.make(size, classes=0)
            plain.load_state_dict(network.state_dict(), strict=True)
            network = plain
        else:
            cast(Any, network).pretrained_cfg["state_dict"] = None
        return network

    @property
    def _names(self) -> Json:
        """The names of layers and the kind of input that timm registers for the network."""
        known = timm.models.get_pretrained_cfg(self.name, allow_unregistered=True)
        registered = PretrainedCfg() if known is None else known
        return {
            "classifier": registered.classifier,
            "first_conv": registered.first_conv,
            "fixed_input_size": registered.fixed_input_size,
        }


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
            "crop_mode": "squash" if view.resize_mode == "stretch" else "center",
            "interpolation": "bicubic",
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "first_conv": timm_config.get("first_conv"),
            "classifier": timm_config.get("classifier"),
        },
        "dtcache": {
            "view": {"height": view.height, "width": view.width, "resize_mode": view.resize_mode}
        },
    }
    model_args = dict(backbone.model_args)
    if backbone.fixed_size:
        model_args["img_size"] = list(backbone.default_size)
    if model_args:
        config["model_args"] = model_args
    make_folders(folder)
    write_file(folder / WEIGHTS, weight_bytes(backbone.model))
    write_file(folder / CONFIG, json.dumps(config, indent=1).encode())


def load_backbone(
    folder: Path, size: tuple[int, int] | None = None
) -> tuple[Backbone, tuple[int, int], ViewSpec | None]:
    """Read a folder of `save_backbone`, or of timm's `save_for_hf` or `push_to_hf_hub`.

    The weights are those that timm reads: a classifier is left out. A network that takes one input
    size only is built for `size` (H, W) [default: that of the folder], and its position embedding
    is resampled. Returns the backbone, and the input size (height, width) and the view of its
    training. The view is None if the folder records none. Reads JSON and safetensors only. Raises
    ConfigError if the folder has no configuration, and WeightsError if a file does not fit or is
    out of bounds.
    """
    saved = _saved(folder)
    input_size = size or saved.input_size
    model = _filled(folder, saved, input_size)
    backbone = Backbone(model, mean=saved.mean, std=saved.std, size=input_size)
    backbone.model_args = saved.model_args
    return backbone, saved.input_size, saved.view


def load_any_size(folder: Path) -> tuple[nn.Module, SavedBackbone]:
    """Read a folder as `load_backbone` does; the network takes every size that timm lets it take.

    A ViT resamples its position embedding in each pass, unless the pass has the folder's own size.
    Returns the network, in evaluation mode, and its configuration. Raises what `load_backbone`
    raises.
    """
    saved = _saved(folder)
    network = _filled(folder, saved, saved.input_size)
    if getattr(network, "dynamic_img_size", True) is False:
        dynamic = replace(saved, model_args={**saved.model_args, "dynamic_img_size": True})
        with torch.random.fork_rng(devices=[]):
            flexible = dynamic.make(saved.input_size, classes=0)
        flexible.load_state_dict(network.state_dict(), strict=True)
        network = flexible
    return network.eval(), saved


def _filled(folder: Path, saved: SavedBackbone, input_size: tuple[int, int]) -> nn.Module:
    """Return the network of a folder for an input size (H, W). Raises WeightsError."""
    return load_weights(
        folder / WEIGHTS,
        lambda: saved.make(saved.input_size, saved.classes),
        title=saved.name,
        again=AGAIN,
        fill=lambda weights: saved.fill(weights, input_size),
    )


def _saved(folder: Path) -> SavedBackbone:
    """Return the configuration of a backbone's folder, as timm reads it.

    Raises ConfigError if there is none, and WeightsError if it is malformed or out of bounds.
    """
    config = read_config(folder / CONFIG, expected=EXPECTED, again=AGAIN)
    try:
        name = config["architecture"]
        # Older versions of timm wrote one level.
        cfg = config.get("pretrained_cfg", config)
        if not isinstance(name, str) or name not in timm.list_models():
            raise ValueError(
                f"architecture {str(name)[:60]!r} is not a network of timm {timm.__version__}"
            )
        args = _model_args(config.get("model_args") or {})
        channels, *sides = cfg["input_size"]
        channels = args.pop("in_chans", channels)
        if channels != 3:
            raise ValueError(f"input_size {cfg['input_size']} is not (3, height, width)")
        input_size = bounded(sides[0]), bounded(sides[1])
        if sized(name, input_size):
            saved_size = args.pop("img_size", None) or input_size
            height, width = (
                saved_size if isinstance(saved_size, (list, tuple)) else (saved_size, saved_size)
            )
            input_size = bounded(height), bounded(width)
        classes = config.get("num_classes", cfg.get("num_classes", 0))
        mean = rgb(cfg["mean"])
        std = rgb(cfg["std"])
        if min(std) <= 0:
            raise ValueError(f"std {std} is not positive")
        return SavedBackbone(
            name=name,
            classes=bounded(classes, MAX_CLASSES) if classes else 0,
            input_size=input_size,
            mean=mean,
            std=std,
            view=read_view(config["dtcache"]["view"]) if "dtcache" in config else None,
            model_args=args,
        )
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        OverflowError,  # an integer that is larger than any float
    ) as error:
        raise WeightsError(
            f"{folder / CONFIG}: not the configuration of a backbone ({error}); expected {EXPECTED}"
        ) from error


def _model_args(args: Any) -> Json:
    """Return the arguments of a network in a configuration, without its number of classes.

    Raises ValueError for an argument that a folder may not set, and for a number out of bounds.
    """
    checked: Json = {name: value for name, value in dict(args).items() if name != "num_classes"}
    for name, value in checked.items():
        if name in OF_THE_CALL:
            raise ValueError(f"model_args may not set {name}")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > MAX_SIDE:
                raise ValueError(f"model_args {name} of {number} is not at most {MAX_SIDE}")
    return checked


def open_in_timm(folder: Path) -> nn.Module:
    """Return the network that timm builds from a backbone's folder, loaded strictly."""
    # Without pretrained=True timm returns random weights without a warning.
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)


def sized(name: str, size: tuple[int, int] | None) -> Json:
    """Return the arguments with which timm builds a network for an input size (H, W).

    They are empty unless the network takes one input size only.
    """
    known = timm.models.get_pretrained_cfg(split_model_name_tag(name)[0], allow_unregistered=True)
    return (
        {"img_size": size}
        if size is not None and known is not None and known.fixed_input_size
        else {}
    )


def rgb(values: Any) -> Rgb:
    """Return three finite numbers as a tuple. Raises ValueError for anything else."""
    red, green, blue = (float(value) for value in values)
    if not all(math.isfinite(value) for value in (red, green, blue)):
        raise ValueError(f"{values} are not three finite numbers")
    return red, green, blue
