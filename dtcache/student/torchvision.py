"""Backbones as torchvision networks.

No weight is renamed: both libraries use the same names, which is checked.
"""

import torchvision
from torch import nn

from dtcache.errors import ConfigError
from dtcache.student.backbone import Backbone

HEADS = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), "fc"),
    **dict.fromkeys(("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"), "fc"),
    **dict.fromkeys(("wide_resnet50_2", "wide_resnet101_2"), "fc"),
    **dict.fromkeys(("densenet121", "densenet161", "densenet169", "densenet201"), "classifier"),
}
"""Name of the classifier, by network that timm and torchvision build and name alike."""


def torchvision_network(backbone: Backbone) -> tuple[nn.Module, str]:
    """Return torchvision's network of a backbone, with random weights, and its classifier's name.

    The classifier is replaced by the identity. Raises ConfigError if torchvision has no such
    network or names its weights differently.
    """
    head = HEADS.get(backbone.name)
    if head is None:
        raise ConfigError(
            f"`to='torchvision'`: torchvision has no network with the weights' names of "
            f"{backbone.name}; expected one of {', '.join(HEADS)}; use `to='timm'`"
        )
    network: nn.Module = torchvision.models.get_model(backbone.name, weights=None)
    setattr(network, head, nn.Identity())
    ours, theirs = (
        {k: v.shape for k, v in net.state_dict().items()} for net in (backbone.model, network)
    )
    if ours != theirs:
        odd = sorted(set(ours.items()) ^ set(theirs.items()))
        raise ConfigError(
            f"`to='torchvision'`: the weights of {backbone.name} differ from those of torchvision "
            f"{torchvision.__version__} ({odd[0][0]}); use `to='timm'`"
        )
    return network, head
