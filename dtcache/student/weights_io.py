"""Networks in folders of JSON and safetensors, read with bounds: nothing in them is run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from dtcache.errors import ConfigError
from dtcache.hashing import read_json
from dtcache.recipe import MAX_SIDE, Json, ViewSpec

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20

Network = TypeVar("Network", bound=nn.Module)


def read_config(path: Path, *, expected: str, again: str) -> Json:
    """Return the JSON object in a file. Raises ConfigError with what was `expected` and how it is made `again`."""
    if not path.is_file():
        raise ConfigError(f"{path}: missing; expected {expected}")
    try:
        return read_json(path, MAX_CONFIG_BYTES)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; {again}") from error


def load_weights(path: Path, make: Callable[[], Network], *, title: str, again: str) -> Network:
    """Return the network that `make` builds with the weights in a file, loaded strictly and all of them finite.

    Memory is taken for no more than the file holds, where that can be told beforehand, and no random number from the
    caller. Raises ConfigError.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: the weights are missing; {again}")
    try:
        if (needed := _needed_bytes(make)) > path.stat().st_size:
            raise RuntimeError(
                f"its configuration asks for {needed} bytes, the file has {path.stat().st_size}"
            )
        weights = safetensors.torch.load_file(path)
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise RuntimeError("some of them are not finite")
        with torch.random.fork_rng(devices=[]):
            network = make()
        network.load_state_dict(weights, strict=True)
    except (SafetensorError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path}: not the weights of {title} ({reason}); {again}") from error
    return network


def _needed_bytes(make: Callable[[], nn.Module]) -> int:
    """Return the size of the weights of the network that `make` builds, without taking memory for them.

    It is 0 where that cannot be told: older versions of timm compute with tensors while they build some networks.
    """
    try:
        with torch.device("meta"):
            return sum(value.nbytes for value in make().state_dict().values())
    except RuntimeError:
        # What fails for another reason fails again, by name, when the network is built for good.
        return 0


def weight_bytes(network: nn.Module) -> bytes:
    """Return a network's weights as a safetensors file."""
    weights = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    return safetensors.torch.save(weights, {"format": "pt"})


def bounded(value: Any, most: int = MAX_SIDE) -> int:
    """Return a size that a configuration asks for. Raises ValueError where it is no whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ValueError(f"a size of {str(value)[:40]} is not a number from 1 to {most}")
    return value


def read_view(view: Any) -> ViewSpec:
    """Return the view that a configuration records. Raises ValueError, KeyError or TypeError."""
    if view["fit"] not in ("crop", "stretch"):
        raise ValueError(f"fit {view['fit']!r} is neither crop nor stretch")
    return ViewSpec(height=bounded(view["height"]), width=bounded(view["width"]), fit=view["fit"])
