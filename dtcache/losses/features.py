"""The losses of feature distillation: pure functions, computed in fp32.

Shapes: B batch, C channels, H rows, W columns, P = H x W positions.
"""

from torch import Tensor

from dtcache.arguments import require
from dtcache.errors import ConfigError

EPS = 1e-12
"""Added under every root, so that the gradient is finite if the argument is zero."""


def require_maps(**maps: Tensor) -> None:
    """Raise ConfigError, with the name of an argument, unless all are maps of one shape."""
    shapes = []
    for name, x in maps.items():
        if not isinstance(x, Tensor):
            require(name, x, Tensor, "a tensor of four axes")
        shapes.append(tuple(x.shape))
        if x.ndim != 4 or shapes[-1] != shapes[0]:
            wanted = "four axes" if x.ndim != 4 else f"the shape {shapes[0]} of the prediction"
            raise ConfigError(
                f"`{name}`: expected {wanted}, got {shapes[-1]}; pass maps of one shape"
            )


def mse_loss(predicted_BCHW: Tensor, whitened_BCHW: Tensor) -> Tensor:
    """Return the mean squared error to the whitened teacher feature, a scalar (paper: MSE).

    The mean is over all elements. Raises ConfigError if the shapes differ.
    """
    require_maps(predicted_BCHW=predicted_BCHW, whitened_BCHW=whitened_BCHW)
    return (predicted_BCHW.float() - whitened_BCHW.float()).square().mean()


def mse_per_image(predicted_BCHW: Tensor, whitened_BCHW: Tensor) -> Tensor:
    """Return the mean squared error of each image, (B,); their mean is `mse_loss`."""
    require_maps(predicted_BCHW=predicted_BCHW, whitened_BCHW=whitened_BCHW)
    return (predicted_BCHW.float() - whitened_BCHW.float()).square().mean((1, 2, 3))


def attention_map(feature_BCHW: Tensor) -> Tensor:
    """Return Q = vec(sum_c |A_c|^2), fp32 (B, P), each sample of unit length (paper: AT, p = 2)."""
    energy_BP = feature_BCHW.float().square().sum(1).flatten(1)
    return energy_BP / (energy_BP.square().sum(1, keepdim=True) + EPS).sqrt()


def at_loss(predicted_BCHW: Tensor, raw_BCHW: Tensor) -> Tensor:
    """Return the attention-transfer loss to the RAW teacher feature, a scalar (paper: AT).

    The loss is |Q_predicted - Q_raw| per sample, averaged over the batch. Raises ConfigError if the
    shapes differ.
    """
    return at_per_image(predicted_BCHW, raw_BCHW).mean()


def at_per_image(predicted_BCHW: Tensor, raw_BCHW: Tensor) -> Tensor:
    """Return the attention-transfer loss of each image, (B,); their mean is `at_loss`."""
    require_maps(predicted_BCHW=predicted_BCHW, raw_BCHW=raw_BCHW)
    difference_BP = attention_map(predicted_BCHW) - attention_map(raw_BCHW)
    return (difference_BP.square().sum(1) + EPS).sqrt()
