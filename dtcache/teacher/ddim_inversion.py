"""DDIM inversion: an image's deterministic encoding (Song et al. 2021, eq. 12 and 13)."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from dtcache.errors import ConfigError, TeacherError
from dtcache.teacher.noising import timestep_batch

PREDICTIONS = ("epsilon", "v_prediction", "sample")

Predictor = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The complete network: fp32 x_BCHW, int64 t_B and class labels (or None) to a prediction.

The prediction is fp32. It has as many channels as x or, if variances are learned, twice as many.
"""


class Inversion:
    """The deterministic encoding: an image always gives the same x_T. Nothing is clipped."""

    def __init__(
        self, predictor: Predictor, alpha_bars: Tensor, prediction: str, steps: int
    ) -> None:
        """Take alpha_bar by timestep, fp32 (T,), and diffusers' name of the network's prediction.

        Raises TeacherError if the prediction is not supported.
        """
        if prediction not in PREDICTIONS:
            raise TeacherError(
                f"`encoding='ddim'`: expected a teacher that predicts {', '.join(PREDICTIONS)}, "
                f"got {prediction!r}; use `encoding='ddpm'`"
            )
        self._predictor = predictor
        self._prediction = prediction
        self._steps = steps
        self._alpha_bars = alpha_bars.double().cpu()

    def noise_shape(self, height: int, width: int) -> None:
        """Return None: an inversion takes no noise."""
        return None

    def inputs(
        self, clean_BCHW: Tensor, noise_BCHW: Tensor | None, timestep: int, labels_B: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return x_T of the inversion (fp32), int64 t_B and the labels."""
        inverted_BCHW = self._travel(clean_BCHW, ddim_levels(timestep, self._steps), labels_B)
        return inverted_BCHW, timestep_batch(clean_BCHW, timestep), labels_B

    def round_trip(
        self, clean_BCHW: Tensor, timestep: int, labels_B: Tensor | None = None
    ) -> Tensor:
        """Return the error of images x inverted up to `timestep` and denoised back to x'.

        It is ||x' - x||^2 / ||x||^2, float64 (B,).
        """
        levels = ddim_levels(timestep, self._steps)
        back_BCHW = self._travel(self._travel(clean_BCHW, levels, labels_B), levels[::-1], labels_B)
        error_B = (back_BCHW - clean_BCHW).double().square().flatten(1).sum(1)
        return error_B / clean_BCHW.double().square().flatten(1).sum(1).clamp_min(1e-12)

    def _travel(self, x_BCHW: Tensor, levels: list[int], labels_B: Tensor | None) -> Tensor:
        """Step through noise levels; the network predicts at the level where a step starts."""
        for here, there in pairwise(levels):
            output_BCHW = self._predictor(x_BCHW, timestep_batch(x_BCHW, here), labels_B)[
                :, : x_BCHW.shape[1]
            ]
            a = float(self._alpha_bars[here])
            b = float(self._alpha_bars[there])
            x_BCHW = ddim_step(x_BCHW, output_BCHW, a, b, self._prediction)
        return x_BCHW


def ddim_levels(timestep: int, steps: int) -> list[int]:
    """Return steps + 1 noise levels from 0 to `timestep`, evenly spaced, rounded.

    The clean image counts as level 0, as in Dhariwal and Nichol's code: alpha_bar is nearly 1
    there, and the network was trained at it. Raises ConfigError if there are fewer levels than
    steps.
    """
    if steps > timestep:
        raise ConfigError(
            f"`ddim_steps` {steps}: expected at most {timestep}, the steps up to `timestep` "
            f"{timestep}; pass fewer"
        )
    return [round(i * timestep / steps) for i in range(steps + 1)]


def ddim_step(
    x_BCHW: Tensor, output_BCHW: Tensor, here: float, there: float, prediction: str
) -> Tensor:
    """Return x at alpha_bar `there` from x and the network's output at `here`, in fp32.

    x' = sqrt(there) x_0 + sqrt(1 - there) epsilon, where x_0 and epsilon follow from the output,
    with x = sqrt(here) x_0 + sqrt(1 - here) epsilon and v = sqrt(here) epsilon - sqrt(1 - here) x_0
    (Salimans & Ho 2022).
    """
    signal = here**0.5
    noise = (1.0 - here) ** 0.5
    if prediction == "epsilon":
        epsilon_BCHW = output_BCHW
        clean_BCHW = (x_BCHW - noise * epsilon_BCHW) / signal
    elif prediction == "sample":
        clean_BCHW = output_BCHW
        epsilon_BCHW = (x_BCHW - signal * clean_BCHW) / noise
    else:
        clean_BCHW = signal * x_BCHW - noise * output_BCHW
        epsilon_BCHW = signal * output_BCHW + noise * x_BCHW
    result: Tensor = there**0.5 * clean_BCHW + (1.0 - there) ** 0.5 * epsilon_BCHW
    return result
