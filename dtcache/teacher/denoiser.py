"""What dtcache needs of a noise-predicting network, whatever its architecture; and the choice among
its taps.
"""

import copy
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from dtcache.errors import ConfigError
from dtcache.recipe import TapSpec

PREFERRED_STRIDES = (4, 8, 16, 32)
DEFAULT_TAPS = 4


class Denoiser(Protocol):
    """A loaded network of one architecture: it knows its own geometry, its own taps and what it is
    conditioned on.
    """

    channels: int
    """Channels of its input: 3 of pixels, or those of a latent."""
    native_size: tuple[int, int] | None
    """(height, width) of the input that it was trained at, where its configuration says so."""
    num_classes: int | None
    """Classes that a sample can be said to have; None where it is not class-conditional."""
    null_class: int | None
    """The number that stands for no class, where it is known to have been trained with one."""

    def find_taps(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return every tap for a view (pixels), finest first, with strides against that view,
        measured by a dry pass.

        The network's own input has a `latent_stride`-th of the view's rows and columns. Raises
        ConfigError where it cannot take such a size.
        """

    def tapped(self, taps: Sequence[TapSpec]) -> nn.Module:
        """Return a network that stops after the last of `taps`; it shares its weights with the
        denoiser.

        Its forward pass takes fp32 noisy_BCHW, int64 t_B and, where the denoiser is
        class-conditional, int64 labels_B, else None. It returns the maps (B, C, H, W) by the taps'
        names.
        """

    def predictor(self) -> nn.Module:
        """Return the whole network, which shares its weights with the denoiser and what it tapped.

        Its forward pass takes what that of `tapped` takes, and returns the prediction (B, C, H, W):
        `channels`, and as many again where variances were learned. Raises ConfigError where there
        is no such thing.
        """


def shared_copy(network: nn.Module) -> nn.Module:
    """Return a copy whose modules are its own and whose parameters are the same tensors: it can be
    cut to pieces.
    """
    return copy.deepcopy(network, {id(p): p for p in network.parameters()})


def choose_taps(taps: tuple[TapSpec, ...], names: tuple[str, ...] | None) -> tuple[TapSpec, ...]:
    """Return the taps of some names, in the order of `taps`, or a default.

    The default: strides 4, 8, 16 and 32 where all exist, else the four coarsest. Where many taps
    have one stride, as in a transformer, those at one to four fifths of its depth: the first blocks
    see little but patches and the last ones turn to the noise; the best linear probes lie at about
    half to 0.7 of the depth (DDAE, Xiang et al. 2023; REPA, Yu et al. 2025).

    Raises ConfigError naming the taps that the teacher offers where one is asked for that it does
    not.
    """
    if names is None:
        names = _default_names(taps)
    offered = [tap.name for tap in taps]
    missing = [name for name in names if name not in offered]
    if missing:
        raise ConfigError(
            f"--taps: the teacher has no map {missing[0]} at this size; it offers "
            f"{', '.join(offered)}"
        )
    return tuple(tap for tap in taps if tap.name in names)


def _default_names(taps: tuple[TapSpec, ...]) -> tuple[str, ...]:
    strides = [tap.stride for tap in taps]
    if len(set(strides)) == len(taps):
        preferred = set(PREFERRED_STRIDES) <= set(strides)
        wanted = PREFERRED_STRIDES if preferred else sorted(strides)[-DEFAULT_TAPS:]
        return tuple(tap.name for tap in taps if tap.stride in wanted)
    if len(taps) <= DEFAULT_TAPS:
        return tuple(tap.name for tap in taps)
    places = [round(len(taps) * fifth / (DEFAULT_TAPS + 1)) for fifth in range(1, DEFAULT_TAPS + 1)]
    return tuple(taps[place - 1].name for place in places)
