"""Averages of weights, which are steadier than the weights of any one step."""

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...] | list[Tensor]


def warmed_up_ema(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Return an update of averaged weights whose decay rises as (1 + n) / (10 + n) up to `decay`.

    A constant decay would leave the random starting weights in the average of a short run. Counters are copied.
    """

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))
        else:
            torch._foreach_copy_(averaged, current)

    return update
