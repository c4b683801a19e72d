"""Networks in folders of JSON and safetensors, read with bounds; no code from a folder is run."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dtcache.build_limit import BuildLimitError, limited_build, weight_sizes
from dtcache.errors import ConfigError, WeightsError, one_line
from dtcache.json_files import read_json
from dtcache.recipe import MAX_SIDE, Json, ViewSpec

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20
PICKLES = (".bin", ".pth", ".pt")
CONVERT = (
    "import sys, torch, safetensors.torch as s; "
    "w = torch.load(sys.argv[1], weights_only=True, map_location='cpu'); "
    "s.save_file({k: v.clone() for k, v in w.items()}, sys.argv[2], {'format': 'pt'})"
)
"""Python that converts a pickle of weights, argument 1, to safetensors, argument 2."""

Network = TypeVar("Network", bound=nn.Module)


def read_config(path: Path, *, expected: str, again: str) -> Json:
    """Return the JSON object in a file.

    Raises ConfigError, which names the `expected` folder, if there is no such file, and
    WeightsError, which says how to make the file `again`, if it holds no such object.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: missing; expected {expected}")
    try:
        return read_json(path, MAX_CONFIG_BYTES)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}; {again}") from error


def load_weights(
    path: Path,
    make: Callable[[], Network],
    *,
    title: str,
    again: str,
    fill: Callable[[Mapping[str, Tensor]], Network] | None = None,
) -> Network:
    """Return the network that `make` builds, with the weights in a file, loaded strictly.

    `fill`, if given, builds it from the weights instead, for files that are not loaded as they are.
    A network that needs more memory than the file holds is refused before it is built, if its size
    is known beforehand. The caller's random state is left unchanged. Raises WeightsError if the
    weights are missing, are a pickle, do not fit or are not finite; the error names `title` and how
    to make the file `again`.
    """
    if not path.is_file():
        _refuse_pickles(path)
        raise WeightsError(f"{path}: the weights are missing; {again}")
    try:
        with limited_build([path]):
            needed = _needed_bytes(make)
        if needed > weight_sizes([path])[1]:
            raise RuntimeError(
                f"its configuration needs {needed} bytes, the file has {path.stat().st_size}"
            )
        weights = safetensors.torch.load_file(path)
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise RuntimeError("some of them are not finite")
        with torch.random.fork_rng(devices=[]):
            if fill is not None:
                return fill(weights)
            with limited_build([path]):
                network = make()
        network.load_state_dict(weights, strict=True)
    except (
        BuildLimitError,
        SafetensorError,
        RuntimeError,
        AssertionError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise WeightsError(
            f"{path}: not the weights of {title} ({one_line(error)}); {again}"
        ) from error
    return network


def _refuse_pickles(path: Path) -> None:
    """Raise WeightsError, with a command that converts it, if only a pickle is beside `path`."""
    pickles = sorted(p for p in path.parent.glob("*") if p.suffix in PICKLES and p.is_file())
    if pickles:
        command = shlex.join(["python", "-c", CONVERT, str(pickles[0]), str(path)])
        raise WeightsError(
            f"{pickles[0]}: expected {path.name}, got a pickle, which is never opened. If you "
            f"trust its origin, convert it: {command}"
        )


def _needed_bytes(make: Callable[[], nn.Module]) -> int:
    """Return the bytes of the weights of the network that `make` builds, without allocating them.

    Returns 0 if the size is unknown: older timm versions compute with tensors while they build some
    networks, which the meta device does not support.
    """
    try:
        with torch.device("meta"):
            return sum(value.nbytes for value in make().state_dict().values())
    except (RuntimeError, TypeError, ValueError, AssertionError):
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
    if view["resize_mode"] not in ("crop", "stretch"):
        raise ValueError(f"resize_mode {view['resize_mode']!r} is neither crop nor stretch")
    return ViewSpec(
        height=bounded(view["height"]),
        width=bounded(view["width"]),
        resize_mode=view["resize_mode"],
    )
