"""Encodings: how an image becomes the network's input at a timestep.

This file holds the protocol and noising; ddim_inversion.py holds the inversion.
"""

from typing import Protocol

import torch
from torch import Tensor


class Encoding(Protocol):
    """Turns clean images, and the noise that belongs to them, into the network's arguments."""

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int] | None:
        """Return the (C, H, W) of the noise for a view of `height` x `width` pixels.

        Returns None if the encoding takes no noise.
        """

    def inputs(
        self, clean_BCHW: Tensor, noise_BCHW: Tensor | None, timestep: int, labels_B: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the arguments of the tapped network's forward pass.

        `clean_BCHW` is fp32 in [-1, 1], or scaled latents; `noise_BCHW` is standard normal fp32 of
        `noise_shape`; `labels_B` are the int64 classes that condition the network. All are on the
        device.
        """


class Noising:
    """The paper's encoding, fp32: x_t = sqrt(a) x + sqrt(1 - a) noise (Ho et al. 2020, eq. 4)."""

    def __init__(self, alpha_bars: Tensor, channels: int, stride: int = 1) -> None:
        """Take alpha_bar by timestep, fp32 (T,) on the device.

        `channels` and `stride` (relative to the view) describe the network's input.
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
        if noise_BCHW is None:
            raise TypeError("noising needs noise of `noise_shape`, got None")
        alpha_bar = self._alpha_bars[timestep]
        noisy_BCHW = alpha_bar.sqrt() * clean_BCHW + (1.0 - alpha_bar).sqrt() * noise_BCHW
        return noisy_BCHW, timestep_batch(noisy_BCHW, timestep), labels_B


def timestep_batch(x_BCHW: Tensor, timestep: int) -> Tensor:
    """Return `timestep` once per sample: int64 (B,), on the device of `x_BCHW`."""
    return torch.full((len(x_BCHW),), timestep, dtype=torch.long, device=x_BCHW.device)
