"""Deterministic encoding: DDIM run backwards, from the image up to a noise level (Song et al. 2021,
eq. 12 and 13).
"""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from dtcache.errors import ConfigError, TeacherError
from dtcache.teacher.noising import steps_of

PREDICTIONS = ("epsilon", "v_prediction", "sample")

Predictor = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The whole network: fp32 x_BCHW, int64 t_B and the labels that it is told to its fp32 output, of
as many channels or, with learned variances, twice as many.
"""


class Inversion:
    """The deterministic encoding: the same image always becomes the same x_T. Nothing is clipped on
    the way.
    """

    def __init__(
        self, predictor: Predictor, alpha_bars: Tensor, prediction: str, steps: int
    ) -> None:
        """Take alpha_bar by timestep, fp32 (T,), and what the network predicts. Raises TeacherError
        for another.
        """
        if prediction not in PREDICTIONS:
            raise TeacherError(
                f"--encoding ddim: expected a teacher that predicts {', '.join(PREDICTIONS)}, got "
                f"{prediction!r}; use --encoding ddpm"
            )
        self._predictor = predictor
        self._prediction = prediction
        self._steps = steps
        self._alpha_bars = alpha_bars.double().cpu()

    def noise_shape(self, height: int, width: int) -> None:
        """Return None: there is no noise in it."""
        return None

    def inputs(
        self, clean_BCHW: Tensor, noise_BCHW: Tensor | None, timestep: int, labels_B: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return x_T of the inversion, fp32, int64 t_B and the labels."""
        inverted_BCHW = self._travel(clean_BCHW, ddim_levels(timestep, self._steps), labels_B)
        return inverted_BCHW, steps_of(clean_BCHW, timestep), labels_B

    def round_trip(
        self, clean_BCHW: Tensor, timestep: int, labels_B: Tensor | None = None
    ) -> Tensor:
        """Return ||x' - x||^2 / ||x||^2, float64 (B,), of images inverted up to `timestep` and
        denoised back.
        """
        levels = ddim_levels(timestep, self._steps)
        back_BCHW = self._travel(self._travel(clean_BCHW, levels, labels_B), levels[::-1], labels_B)
        error_B = (back_BCHW - clean_BCHW).double().square().flatten(1).sum(1)
        return error_B / clean_BCHW.double().square().flatten(1).sum(1).clamp_min(1e-12)

    def _travel(self, x_BCHW: Tensor, levels: list[int], labels_B: Tensor | None) -> Tensor:
        """Step through noise levels, up or down; the network is asked at the level that a step
        starts from.
        """
        for here, there in pairwise(levels):
            output_BCHW = self._predictor(x_BCHW, steps_of(x_BCHW, here), labels_B)[
                :, : x_BCHW.shape[1]
            ]
            a = float(self._alpha_bars[here])
            b = float(self._alpha_bars[there])
            x_BCHW = ddim_step(x_BCHW, output_BCHW, a, b, self._prediction)
        return x_BCHW


def ddim_levels(timestep: int, steps: int) -> list[int]:
    """Return steps + 1 noise levels from 0 to `timestep`, evenly spaced, rounded.

    The image stands at level 0, as in Dhariwal & Nichol's code: alpha_bar is all but 1 there, and
    the network knows it. Raises ConfigError where there are not that many levels.
    """
    if steps > timestep:
        raise ConfigError(
            f"--ddim-steps {steps}: expected at most {timestep}, the steps up to --timestep "
            f"{timestep}"
        )
    return [round(i * timestep / steps) for i in range(steps + 1)]


def ddim_step(
    x_BCHW: Tensor, output_BCHW: Tensor, here: float, there: float, prediction: str
) -> Tensor:
    """Return x at alpha_bar `there` from x at alpha_bar `here` and the network's output at it, in
    fp32.

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
