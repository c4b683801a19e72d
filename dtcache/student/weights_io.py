"""Networks in folders of JSON and safetensors, read with bounds; no code from a folder is run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from dtcache.errors import ConfigError, one_line
from dtcache.hashing import read_json
from dtcache.recipe import MAX_SIDE, Json, ViewSpec

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20

Network = TypeVar("Network", bound=nn.Module)


def read_config(path: Path, *, expected: str, again: str) -> Json:
    """Return the JSON object in a file.

    Raises ConfigError. The message says which file was `expected` and how to make it `again`.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: missing; expected {expected}")
    try:
        return read_json(path, MAX_CONFIG_BYTES)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; {again}") from error


def load_weights(path: Path, make: Callable[[], Network], *, title: str, again: str) -> Network:
    """Return the network that `make` builds, with the weights in a file, loaded strictly.

    A network that needs more memory than the file holds is refused before it is built, if its size
    is known beforehand. The caller's random state is left unchanged. Raises ConfigError if the
    weights are missing, do not fit or are not finite; the error names `title` and how to make the
    file `again`.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: the weights are missing; {again}")
    try:
        if (needed := _needed_bytes(make)) > path.stat().st_size:
            raise RuntimeError(
                f"its configuration needs {needed} bytes, the file has {path.stat().st_size}"
            )
        weights = safetensors.torch.load_file(path)
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise RuntimeError("some of them are not finite")
        with torch.random.fork_rng(devices=[]):
            network = make()
        network.load_state_dict(weights, strict=True)
    except (SafetensorError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{path}: not the weights of {title} ({one_line(error)}); {again}"
        ) from error
    return network


def _needed_bytes(make: Callable[[], nn.Module]) -> int:
    """Return the bytes of the weights of the network that `make` builds, without allocating them.

    Returns 0 if the size is unknown: older timm versions compute with tensors while they build some
    networks, which the meta device does not support.
    """
    try:
        with torch.device("meta"):
            return sum(value.nbytes for value in make().state_dict().values())
    except RuntimeError:
        # Any other error recurs, and is reported, when the network is built on a real device.
        return 0


def weight_bytes(network: nn.Module) -> bytes:
    """Return a network's weights as a safetensors file."""
    weights = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    return safetensors.torch.save(weights, {"format": "pt"})


def bounded(value: Any, most: int = MAX_SIDE) -> int:
    """Return a size from a configuration.

    Raises ValueError unless it is an integer in [1, `most`].
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ValueError(f"a size of {str(value)[:40]} is not a number from 1 to {most}")
    return value


def read_view(view: Any) -> ViewSpec:
    """Return the view in a configuration.

    Raises ValueError, KeyError or TypeError if it is damaged.
    """
    if view["fit"] not in ("crop", "stretch"):
        raise ValueError(f"fit {view['fit']!r} is neither crop nor stretch")
    return ViewSpec(height=bounded(view["height"]), width=bounded(view["width"]), fit=view["fit"])
