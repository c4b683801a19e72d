"""The interface of a denoising network of any architecture, and the choice among its taps."""

import copy
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from dtcache.errors import ConfigError
from dtcache.recipe import TapSpec

PREFERRED_STRIDES = (4, 8, 16, 32)
DEFAULT_TAPS = 4


class Denoiser(Protocol):
    """A loaded network of one architecture: its geometry, its taps and its conditions."""

    channels: int
    """Channels of the network's input: 3 for pixels, or the channels of its latents."""
    native_size: tuple[int, int] | None
    """(height, width) of the network's input in training; None if the configuration lacks it."""
    num_classes: int | None
    """Number of classes that can condition the network; None if it is not class-conditional."""
    null_class: int | None
    """The class that means no class; None if the network is not known to have one."""

    def find_taps(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return every tap for a view in pixels, finest first, as a dry pass measures them.

        Strides are relative to the view. The network's input has 1 / `latent_stride` of the view's
        rows and columns. Raises ConfigError if the network does not take that size.
        """

    def find_blocks(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return the taps beside those of `find_taps`, in the order of the pass.

        They are chosen by name alone: the default has none of them. Raises what `find_taps` raises.
        """

    def tapped(self, taps: Sequence[TapSpec]) -> nn.Module:
        """Return a network that ends after the last of `taps` and shares the denoiser's weights.

        Its forward pass takes fp32 noisy_BCHW, int64 t_B, and int64 labels_B if the denoiser is
        class-conditional, else None. It returns the maps (B, C, H, W) by tap name.
        """

    def predictor(self) -> nn.Module:
        """Return the complete network, which shares its weights with tapped networks.

        Its forward pass takes the arguments of `tapped` and returns the prediction: (B, C, H, W),
        or (B, 2 C, H, W) if variances are learned; a network that predicts no noise returns its
        last features. Raises ConfigError if the prediction is not known.
        """


def shared_copy(network: nn.Module) -> nn.Module:
    """Return a copy that can be truncated: new modules with the same parameter tensors."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters()})


def choose_taps(
    taps: tuple[TapSpec, ...],
    names: tuple[str, ...] | None,
    blocks: tuple[TapSpec, ...] = (),
    *,
    is_noised: bool = True,
) -> tuple[TapSpec, ...]:
    """Return the taps with these names, among `taps` and `blocks`, finest first; None: a default.

    No default contains `blocks`. The default is strides 4, 8, 16 and 32 if all exist, else the four
    coarsest. If several taps share a stride, as in a transformer, the default is the taps at one to
    four fifths of its depth. The first blocks have little context beyond their patches, and the
    last blocks specialise in the noise; linear probes are best at about half to 0.7 of the depth
    (DDAE, Xiang et al. 2023; REPA, Yu et al. 2025). A transformer that reads images without noise
    (not `is_noised`) is tapped at one to four quarters of its depth, as dense heads on ViTs are
    (DPT, Ranftl et al. 2021; DINOv2, Oquab et al. 2023).

    Raises ConfigError listing the teacher's taps if one of `names` is not among them.
    """
    if names is None:
        names = _default_names(taps, DEFAULT_TAPS + 1 if is_noised else DEFAULT_TAPS)
    offered = [tap.name for tap in (*taps, *blocks)]
    missing = [name for name in names if name not in offered]
    if missing:
        raise ConfigError(
            f"`taps` {missing[0]}: the teacher has no such map at this size; expected "
            f"{', '.join(offered)}"
        )
    chosen = [tap for tap in (*taps, *blocks) if tap.name in names]
    return tuple(sorted(chosen, key=lambda tap: tap.stride))


def _default_names(taps: tuple[TapSpec, ...], parts: int) -> tuple[str, ...]:
    """Return the default; in a transformer, the ends of the first four of `parts` equal parts."""
    strides = [tap.stride for tap in taps]
    if len(set(strides)) == len(taps):
        preferred = set(PREFERRED_STRIDES) <= set(strides)
        default = PREFERRED_STRIDES if preferred else sorted(strides)[-DEFAULT_TAPS:]
        return tuple(tap.name for tap in taps if tap.stride in default)
    if len(taps) <= DEFAULT_TAPS:
        return tuple(tap.name for tap in taps)
    depths = [round(len(taps) * part / parts) for part in range(1, DEFAULT_TAPS + 1)]
    return tuple(taps[depth - 1].name for depth in depths)
