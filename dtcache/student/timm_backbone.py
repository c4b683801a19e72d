"""Backbones built from timm names, with random weights, timm's, or those of a folder."""

import difflib
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import split_model_name_tag

from dtcache.errors import ConfigError, WeightsError, one_line
from dtcache.student.backbone import Backbone
from dtcache.student.backbone_io import load_backbone, rgb, sized


def make_backbone(
    name: str, *, init: str | None, seed: int, size: tuple[int, int] | None = None
) -> Backbone:
    """Build a backbone from its timm name.

    A network that takes one input size only is built for `size` (H, W). `init` is None for random
    weights, a function of `seed`; "pretrained" for timm's weights; else a folder that
    `load_backbone` reads. Raises ConfigError for an unknown name, a name with a tag without
    pretrained weights, a network without a pyramid, and an `init` or `size` that does not fit the
    network.
    """
    require_known(name)
    network, tag = split_model_name_tag(name)
    if tag and init != "pretrained":
        raise ConfigError(
            f"`student` {name}: expected `init='pretrained'`, as the tag {tag} names pretrained "
            f"weights, got {'random weights' if init is None else f'`init` {init}'}; pass "
            f"`init='pretrained'`, or `student` {network}"
        )
    if init not in (None, "pretrained"):
        loaded, _, _ = load_backbone(Path(init), size)
        if loaded.name != network:
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
                name, pretrained=init == "pretrained", num_classes=0, **sized(name, size)
            )
        except (
            RuntimeError,
            ValueError,
            OSError,
            AssertionError,
            TypeError,
            HfHubHTTPError,
        ) as error:
            at = f" at {size[0]}x{size[1]} pixels" if size else ""
            advice = (
                f"check the name's tag and the connection to the hub, or use {network} with random "
                "weights"
                if init
                else "check the network and the size"
            )
            # An OSError is a failure of the network or of the disk.
            failure = WeightsError if isinstance(error, OSError) else ConfigError
            raise failure(
                f"timm cannot make {name} with {init or 'random'} weights{at} "
                f"({one_line(error, 200)}); {advice}"
            ) from error
    timm_config = cast(Any, model).pretrained_cfg
    return Backbone(model, mean=rgb(timm_config["mean"]), std=rgb(timm_config["std"]), size=size)


def hub_repository(name: str) -> str:
    """Return the hub repository of the weights of a timm name, with or without a tag.

    Raises ConfigError if timm has no such network, or registers no such weights in a repository.
    """
    require_known(name)
    network = split_model_name_tag(name)[0]
    tags = timm.list_pretrained(f"{network}.*")
    # timm falls back to random weights if a tag is unknown.
    known = name in tags or name == network
    registered = timm.get_pretrained_cfg(name) if known else None
    if registered is None or not registered.hf_hub_id:
        offered = f"timm has {', '.join(tags[:8])}" if tags else f"timm has none of {network}"
        raise ConfigError(
            f"{name[:80]}: expected weights in a repository of the Hugging Face hub; {offered}"
        )
    return str(registered.hf_hub_id)


def weights_tag(name: str) -> str:
    """Return the tag of a timm name, which names pretrained weights; empty without one."""
    return split_model_name_tag(name)[1]


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
