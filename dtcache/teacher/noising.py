"""How an image becomes what the teacher's network sees at a timestep: noised here, inverted in
`invert`.
"""

from typing import Protocol

import torch
from torch import Tensor


class Encoding(Protocol):
    """Turns clean images, and the noise that belongs to them, into the network's arguments."""

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int] | None:
        """Return the (C, H, W) of the noise that a view of that size takes, or None where it takes
        none.
        """

    def inputs(
        self, clean_BCHW: Tensor, noise_BCHW: Tensor | None, timestep: int, labels_B: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the arguments of the tapped network's forward pass; `labels_B` are those that it
        is told.

        `clean_BCHW` is fp32 in [-1, 1], `noise_BCHW` fp32 of `noise_shape`, standard normal; both
        on the device.
        """


class Noising:
    """The stochastic encoding of the paper: x_t = sqrt(a) x + sqrt(1 - a) noise, in fp32 (Ho et al.
    2020, eq. 4).
    """

    def __init__(self, alpha_bars: Tensor, channels: int, stride: int = 1) -> None:
        """Take alpha_bar by timestep, fp32 (steps,), on the device, and the network's input: its
        channels, its stride against the view.
        """
        self._alpha_bars = alpha_bars
        self._channels = channels
        self._stride = stride

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape of the network's input."""
        return self._channels, height // self._stride, width // self._stride

    def inputs(
        self, clean_BCHW: Tensor, noise_BCHW: Tensor | None, timestep: int, labels_B: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return x_t, int64 t_B and the labels."""
        assert noise_BCHW is not None
        alpha_bar = self._alpha_bars[timestep]
        noisy_BCHW = alpha_bar.sqrt() * clean_BCHW + (1.0 - alpha_bar).sqrt() * noise_BCHW
        return noisy_BCHW, steps_of(noisy_BCHW, timestep), labels_B


def steps_of(x_BCHW: Tensor, timestep: int) -> Tensor:
    """Return one timestep for each of a batch: int64 (B,), on its device."""
    return torch.full((len(x_BCHW),), timestep, dtype=torch.long, device=x_BCHW.device)
