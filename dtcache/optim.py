"""The paper's optimizers."""

import torch
from timm.optim.lamb import Lamb
from torch import nn

BETAS = (0.9, 0.95)


def make_optimizer(
    network: nn.Module, kind: str, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return AdamW (`adamw`) or LAMB (`lamb`) with the paper's betas, without decay on norms and biases."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        # Fused, as a pass a parameter and operation is an eighth of a narrow student's step on a CPU.
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
    # timm's default clips at norm 1, which the paper does not.
    return Lamb(groups, lr=lr, betas=BETAS, max_grad_norm=None)
