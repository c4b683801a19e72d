"""What dtcache needs of a noise-predicting network, whatever its architecture; and the choice among its taps."""

import copy
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from dtcache.errors import ConfigError
from dtcache.spec import TapSpec

PREFERRED_STRIDES = (4, 8, 16, 32)


class Denoiser(Protocol):
    """A loaded network of one architecture: it knows its own geometry and its own taps."""

    channels: int
    """Channels of its input: 3 of pixels, or those of a latent."""
    native_size: tuple[int, int] | None
    """(height, width) of the input that it was trained at, where its configuration says so."""

    def find_taps(self, height: int, width: int) -> tuple[TapSpec, ...]:
        """Return every tap, finest first, with strides against its own input of that size, measured by a dry pass.

        Raises ConfigError where it cannot take such a size.
        """

    def tapped(self, taps: Sequence[TapSpec]) -> nn.Module:
        """Return a network that stops after the last of `taps`; it shares its weights with the denoiser.

        Its forward pass takes fp32 noisy_BCHW and int64 t_B, and returns the maps (B, C, H, W) by the taps' names.
        """

    def predictor(self) -> nn.Module:
        """Return the whole network, which shares its weights with the denoiser and what it tapped.

        Its forward pass takes fp32 noisy_BCHW and int64 t_B, and returns the prediction (B, C, H, W): `channels`, and
        as many again where variances were learned. Raises ConfigError where there is no such thing.
        """


def shared_copy(network: nn.Module) -> nn.Module:
    """Return a copy whose modules are its own and whose parameters are the same tensors: it can be cut to pieces."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters()})


def choose_taps(taps: tuple[TapSpec, ...], strides: tuple[int, ...] | None) -> tuple[TapSpec, ...]:
    """Return the taps at `strides`; by default strides 4, 8, 16 and 32 where all exist, else the four coarsest.

    Raises ConfigError naming the strides that the teacher offers where one is asked for that it does not.
    """
    offered = {tap.stride: tap for tap in taps}
    if strides is None:
        strides = PREFERRED_STRIDES if set(PREFERRED_STRIDES) <= set(offered) else tuple(sorted(offered))[-4:]
    missing = sorted(set(strides) - set(offered))
    if missing:
        have = ", ".join(map(str, sorted(offered)))
        raise ConfigError(f"--taps: the teacher has no map of stride {missing[0]} at this size; it offers {have}")
    return tuple(offered[stride] for stride in sorted(set(strides)))
