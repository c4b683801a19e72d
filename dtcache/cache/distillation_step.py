"""The losses of one batch, for the user's own training loop."""

from collections.abc import Callable, Mapping

from torch import Tensor

from dtcache.arguments import require
from dtcache.cache.batch import Batch
from dtcache.errors import ConfigError
from dtcache.losses import Objective, Targets
from dtcache.whitening import unwhiten


def distillation_step(
    student: Callable[[Tensor], Mapping[str, Tensor]],
    batch: Batch,
    objective: Objective | None = None,
) -> dict[str, Tensor]:
    """Return the losses of a student on a batch, fp32 scalars; `loss` is to be minimised.

    `student` turns images (B, 3, H, W) in 0..255 into predictions by array, (B, C, H, W) of the
    targets' shapes, as a network of `build_student` does. `objective` defaults to the mean over
    arrays of the MSE to the whitened features. The other losses are `mse/<array>`, and `at/<array>`
    to the features in the teacher's scale (paper: MSE and AT). The loader's `whitened` has no
    effect.
    Raises ConfigError if the batch has no arrays, or if a prediction is missing or misshapen.
    """
    require("student", student, Callable, "a network")
    require("batch", batch, Batch, "a Batch of cache.loader")
    if objective is not None:
        require("objective", objective, Objective, "an Objective")
    whitened = batch.whitened
    if not whitened:
        raise ConfigError("`batch`: expected targets; make the loader with `names`")
    predicted = student(batch.images_BCHW)
    if not isinstance(predicted, Mapping):
        raise ConfigError(
            f"`student`: expected predictions by array, got {type(predicted).__name__}; use a "
            "network such as build_student's"
        )
    for name, maps_BCHW in whitened.items():
        got = tuple(getattr(predicted.get(name), "shape", ())) or None
        if got != tuple(maps_BCHW.shape):
            raise ConfigError(
                f"`student`: expected a prediction {name} of shape {tuple(maps_BCHW.shape)}, got "
                f"{got}; build the student for the arrays of the loader"
            )
    raw = {name: unwhiten(x_BCHW, batch.scalars[name]) for name, x_BCHW in whitened.items()}
    chosen = objective or Objective(dict.fromkeys(whitened, 1.0), {})
    losses: dict[str, Tensor] = chosen(predicted, Targets(whitened=whitened, raw=raw))
    return losses
