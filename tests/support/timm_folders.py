"""Small timm networks with random weights in folders, as timm's save_for_hf writes them."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 2}
"""Arguments of a small `vit_tiny_patch16_224`: a 4x4 grid of 24 channels, five blocks."""
MEAN = (0.4, 0.5, 0.6)
STD = (0.2, 0.3, 0.25)


def save_network(
    folder: Path, name: str = "vit_tiny_patch16_224", *, classes: int = 0, **model_args: Any
) -> Any:
    """Write a network of timm with random weights to a folder, and return it."""
    torch.manual_seed(0)
    network: Any = timm.create_model(name, num_classes=classes, **model_args).eval()
    for parameter in network.parameters():  # timm's initial biases and scales are 0 or 1e-6
        nn.init.normal_(parameter, std=0.1)
    size = model_args.get("img_size", 32)
    network.pretrained_cfg |= {
        "num_classes": classes,
        "input_size": [3, size, size],
        "mean": MEAN,
        "std": STD,
    }
    save_for_hf(network, str(folder), model_args=model_args, safe_serialization=True)
    return network
