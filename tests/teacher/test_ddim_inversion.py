"""DDIM inversion agrees with diffusers' schedulers and with the exact flow of Gaussian images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from teacher.batches import batch_of

from dtcache.device import resolve_compute
from dtcache.errors import ConfigError, TeacherError
from dtcache.recipe import ViewSpec
from dtcache.teacher import Teacher, TeacherSettings, load_teacher, prepare_teacher
from dtcache.teacher.ddim_inversion import PREDICTIONS, Inversion, ddim_levels, ddim_step

ALPHA_BARS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SPREAD = 0.5
"""Standard deviation of the images of which the best denoiser is known."""


def gaussian_denoiser(prediction: str, *, learned_variance: bool = False):
    """Return the optimal denoiser of images N(0, SPREAD^2 I): E[noise | x_t] is linear in x_t."""

    def predict(x_BCHW: torch.Tensor, t_B: torch.Tensor, labels_B: None) -> torch.Tensor:
        a = ALPHA_BARS[t_B].to(x_BCHW)[:, None, None, None]
        variance = a * SPREAD**2 + 1 - a
        noise = (1 - a).sqrt() * x_BCHW / variance
        clean = a.sqrt() * SPREAD**2 * x_BCHW / variance
        output = {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean,
        }
        found = output[prediction]
        return torch.cat([found, torch.full_like(found, 1e3)], 1) if learned_variance else found

    return predict


def images() -> torch.Tensor:
    return SPREAD * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_is_diffusers_step(prediction: str) -> None:
    """Each prediction type equals DDIMInverseScheduler on its grid with clipping off."""
    oracle = DDIMInverseScheduler(prediction_type=prediction, clip_sample=False)
    oracle.set_timesteps(100)
    x_BCHW, output_BCHW = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for here in (0, 40, 500):
        wanted = oracle.step(output_BCHW, here + 10, x_BCHW).prev_sample
        a = float(ALPHA_BARS[here])
        b = float(ALPHA_BARS[here + 10])
        found = ddim_step(x_BCHW, output_BCHW, a, b, prediction)
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("learned_variance", [False, True])
def test_gaussian_images_flow_as_the_ode_says(prediction: str, learned_variance: bool) -> None:
    """For Gaussian images, x_T is x_0 times the ratio of the standard deviations.

    This is the probability flow of the optimal denoiser. Further channels of learned variance
    change nothing.
    """
    predictor = gaussian_denoiser(prediction, learned_variance=learned_variance)
    found, t_B, _ = Inversion(predictor, ALPHA_BARS, prediction, 400).inputs(
        images(), None, 400, None
    )
    start, end = (float(a) * SPREAD**2 + 1 - float(a) for a in (ALPHA_BARS[0], ALPHA_BARS[400]))
    torch.testing.assert_close(found, images() * math.sqrt(end / start), rtol=5e-3, atol=0)
    assert t_B.tolist() == [400] * 4


def test_nothing_is_clipped() -> None:
    """Values far outside [-1, 1] are not clipped."""
    x_BCHW = torch.full((1, 3, 4, 4), 5.0)
    found, _, _ = Inversion(
        lambda x, t, labels: torch.zeros_like(x), ALPHA_BARS, "epsilon", 10
    ).inputs(x_BCHW, None, 300, None)
    torch.testing.assert_close(found, x_BCHW * (ALPHA_BARS[300] / ALPHA_BARS[0]).sqrt().float())


def test_the_round_trip_comes_home_with_many_steps() -> None:
    """The round trip's error falls with the number of steps and is not zero with few."""
    predictor = gaussian_denoiser("epsilon")
    few, more, many = (
        float(Inversion(predictor, ALPHA_BARS, "epsilon", steps).round_trip(images(), 250).mean())
        for steps in (2, 10, 125)
    )
    assert 1e-3 < few < 1
    assert many < more / 10 < few / 100


def test_levels_are_even_and_reach_the_timestep() -> None:
    """20 steps to 150 start at 0, end at 150 and are 7 or 8 apart."""
    levels = ddim_levels(150, 20)
    assert (levels[0], levels[-1], len(levels)) == (0, 150, 21)
    assert set(np.diff(levels)) == {7, 8}


def test_more_steps_than_levels_are_refused() -> None:
    """More steps than timesteps are refused, since there is no level between two timesteps."""
    with pytest.raises(
        ConfigError, match=r"`ddim_steps` 20: expected at most 10, the steps up to `timestep` 10"
    ):
        ddim_levels(10, 20)


def test_another_prediction_is_refused() -> None:
    """A prediction type other than noise, image or velocity is refused."""
    with pytest.raises(
        TeacherError,
        match=r"predicts epsilon, v_prediction, sample, got 'flow'; use `encoding='ddpm'`",
    ):
        Inversion(gaussian_denoiser("epsilon"), ALPHA_BARS, "flow", 20)


@pytest.fixture
def inverting(teacher_dir: Path) -> Teacher:
    """The small teacher, inverting in 20 steps to T = 200."""
    return prepare_teacher(
        load_teacher(str(teacher_dir)),
        TeacherSettings(
            view=ViewSpec(height=32, width=32),
            taps=("stride4", "stride8"),
            timesteps=(200,),
            batch_size=3,
            ddim_steps=20,
        ),
        resolve_compute("cpu", "fp32"),
    )


def test_features_are_those_of_the_image_that_diffusers_inverts(
    inverting: Teacher, teacher_dir: Path
) -> None:
    """Features and round trip equal diffusers' own inversion of the full network."""
    unet = load_teacher(str(teacher_dir)).denoiser.unet
    up = DDIMInverseScheduler(clip_sample=False)
    down = DDIMScheduler(clip_sample=False)
    up.set_timesteps(100), down.set_timesteps(100)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    clean_BCHW = torch.from_numpy(pixels).float() / 127.5 - 1
    seen = {}
    with torch.inference_mode():
        x = clean_BCHW
        for t in range(0, 200, 10):
            x = up.step(unet(x, t).sample, t + 10, x).prev_sample
        hook = (
            unet.up_blocks[0]
            .upsamplers[0]
            .register_forward_pre_hook(lambda m, args: seen.update(tap=args[0]))
        )
        unet(x, 200)
        hook.remove()
        for t in range(200, 0, -10):
            x = down.step(unet(x, t).sample, t, x).prev_sample
        batch = batch_of(inverting, list(pixels), ["a", "b"], [False, False], seed=0, draws=[0])
        assert batch.noise == ({},)
        (found,) = inverting.features(batch)
        back_B = inverting.encoding.round_trip(clean_BCHW, 200)
    torch.testing.assert_close(found["t200/stride8"], seen["tap"], rtol=1e-3, atol=1e-3)
    wanted_B = (x - clean_BCHW).square().sum((1, 2, 3)) / clean_BCHW.square().sum((1, 2, 3))
    torch.testing.assert_close(back_B, wanted_B.double(), rtol=0.02, atol=1e-9)


def test_inversion_needs_no_noise_and_no_seed(inverting: Teacher) -> None:
    """An image gives the same bits for any key, seed and draw."""
    pixels = [np.random.default_rng(1).integers(0, 256, (3, 32, 32), np.uint8)]
    assert not inverting.is_random
    one, two = (
        next(
            inverting.features(batch_of(inverting, pixels, [key], [False], seed=seed, draws=[draw]))
        )
        for key, seed, draw in (("a", 0, 0), ("b", 9, 5))
    )
    for name in one:
        assert torch.equal(one[name], two[name])


def test_tapping_and_predicting_share_weights(teacher_dir: Path) -> None:
    """The tapped network shares its weights with the denoiser, which stays complete."""
    denoiser = load_teacher(str(teacher_dir)).denoiser
    taps = denoiser.find_taps(32, 32)
    whole = {p.data_ptr() for p in denoiser.predictor().parameters()}
    cut = {p.data_ptr() for p in denoiser.tapped(taps[-1:]).parameters()}
    assert cut < whole
    assert denoiser.find_taps(32, 32) == taps
