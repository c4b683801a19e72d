"""Floating-point operations of one pass of a network, counted on shapes alone."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(network: nn.Module, shape: tuple[int, int, int], classes: int | None = None) -> int:
    """Return the floating-point operations of one pass over one input (C, H, W).

    A multiply-add counts as two, as torch's FlopCounterMode counts it. `classes` is the number of
    classes of a class-conditional network, else None. An autoencoder is not counted.
    """
    tensors = [*network.parameters(), *network.buffers()]
    # A copy on the meta device: counting takes no time and no memory, however large the network.
    hollow = copy.deepcopy(network, {id(x): x.to("meta") for x in tensors})
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        number_B = torch.zeros(1, dtype=torch.long, device="meta")
        condition = [] if classes is None else [number_B]
        hollow(torch.empty(1, *shape, device="meta"), number_B, *condition)
    return int(counter.get_total_flops())
