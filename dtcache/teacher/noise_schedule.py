"""The noise schedule of a variance-preserving model, whichever sampler its configuration names.

The same sampler classes also serve flow matching and EDM. So the settings tell the noise process of
a model, not the class.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from torch import Tensor

from dtcache.errors import TeacherError, TeacherNotFoundError, one_line
from dtcache.recipe import Json
from dtcache.teacher.diffusers_files import read_config

FILE = "scheduler_config.json"
MAX_STEPS = 1_000_000
_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: Mapping[str, Json] = {
    "DDIMInverseScheduler": {},
    "DDIMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSDEScheduler": _STABLE_DIFFUSION,
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _STABLE_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _STABLE_DIFFUSION,
    "KDPM2DiscreteScheduler": _STABLE_DIFFUSION,
    "LCMScheduler": {**_STABLE_DIFFUSION, "beta_schedule": "scaled_linear"},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "RePaintScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": {**_STABLE_DIFFUSION, "beta_schedule": "scaled_linear"},
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "UniPCMultistepScheduler": {},
}
"""Samplers of variance-preserving models in discrete steps.

The values are the class's defaults that differ from DDPMScheduler's: a configuration may leave
defaults out."""
SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
"""Settings that determine alpha-bar; all others choose how to sample."""
PREDICTIONS: Mapping[str, str] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "original_sample": "sample",
}
FOREIGN: Mapping[str, str] = {
    "shift": "flow matching",
    "base_shift": "flow matching",
    "max_shift": "flow matching",
    "invert_sigmas": "flow matching",
    "sigma_data": "EDM",
    "sigma_schedule": "EDM",
    "sampling_eps": "a score-based SDE",
    "snr_shift_scale": "shifted noise levels",
}
"""Settings that no sampler of SCHEDULERS has, with the process that they belong to.

`from_config` of diffusers keeps the settings of the scheduler that it replaces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseSchedule:
    """The noise levels that a network was trained with."""

    alpha_bars: Tensor
    """fp32 (steps,): cumulative product of 1 - beta, from nearly 1 down to 0 or more."""
    kind: str
    """Kind of the betas, such as linear; `given` if the configuration lists them."""
    prediction: str
    """What the network predicts: epsilon, v_prediction or sample."""
    config: Json
    """The configuration, with each number that is not finite as a string: a value to hash."""


def read_schedule(root: Path) -> NoiseSchedule:
    """Return the noise schedule of a teacher's directory.

    Raises TeacherError if there is none, if it belongs to another noise process, or if its betas
    are not in [0, 1]. It is a TeacherNotFoundError if the directory is a part of a teacher.
    """
    nested = root / "scheduler" / FILE
    path = nested if nested.is_file() else root / FILE
    if not path.is_file():
        raise _missing(nested, root)
    config = read_config(path, "the noise schedule")
    name = config.get("_class_name")
    defaults = SCHEDULERS.get(str(name))
    foreign = _other_process(config)
    if defaults is None or foreign is not None:
        reason = f" with {foreign}" if foreign is not None else ""
        raise TeacherError(
            f"{path}: expected the scheduler of a variance-preserving model, got {name!r}{reason}; "
            "dtcache cannot noise images for this model, use a different teacher or a "
            "CallableTeacher in Python"
        )
    prediction = config.get("prediction_type", _legacy_prediction(config))
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        raise TeacherError(
            f"{path}: expected prediction_type {', '.join(PREDICTIONS)}, got {prediction!r}; use "
            "a different teacher"
        )
    settings = {**defaults, **{key: config[key] for key in SETTINGS if key in config}}
    return NoiseSchedule(
        alpha_bars=_alpha_bars(path, settings),
        kind="given"
        if settings.get("trained_betas")
        else str(settings.get("beta_schedule", "linear")),
        prediction=PREDICTIONS[prediction],
        config=_hashable(config),
    )


def _other_process(config: Json) -> str | None:
    """Return the setting that belongs to another noise process and the process, or None."""
    if config.get("use_flow_sigmas"):
        return "use_flow_sigmas (flow matching)"
    prediction = config.get("prediction_type")
    if isinstance(prediction, str) and "flow" in prediction:
        return f"prediction_type {prediction!r} (flow matching)"
    if config.get("timestep_type") not in (None, "discrete"):
        return f"timestep_type {config['timestep_type']!r} (EDM)"
    for key, process in FOREIGN.items():
        if config.get(key) is not None:
            return f"{key} {config[key]!r} ({process})"
    return None


def _legacy_prediction(config: Json) -> str:
    """Return the prediction of a configuration of diffusers < 0.9, which has predict_epsilon."""
    return "sample" if config.get("predict_epsilon") is False else "epsilon"


def _alpha_bars(path: Path, settings: Json) -> Tensor:
    """Return alpha-bar by timestep as DDPMScheduler computes it, fp32."""
    steps = settings.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise TeacherError(
            f"{path}: expected num_train_timesteps from 1 to {MAX_STEPS}, got {steps!r}; download "
            "it again"
        )
    if settings.get("beta_schedule") == "exp" and settings.get("trained_betas") is None:
        # HeunDiscreteScheduler alone has these betas; DDPMScheduler takes them as a list.
        exponential = betas_for_alpha_bar(steps, alpha_transform_type="exp").tolist()
        settings = {**settings, "trained_betas": exponential}
    try:
        scheduler = DDPMScheduler(**settings)
    except Exception as error:  # diffusers raises many types for damaged configurations
        raise TeacherError(
            f"{path}: diffusers cannot make this noise schedule ({one_line(error)}); download it "
            "again"
        ) from error
    betas = scheduler.betas
    if betas.ndim != 1 or len(betas) == 0 or not bool(((betas >= 0) & (betas <= 1)).all()):
        raise TeacherError(
            f"{path}: expected betas from 0 to 1, got "
            + ", ".join(f"{key} {settings[key]!r}"[:80] for key in SETTINGS if key in settings)
            + "; download it again"
        )
    alpha_bars: Tensor = scheduler.alphas_cumprod.float()
    return alpha_bars


def _missing(path: Path, root: Path) -> TeacherError:
    """Return the error of a directory without a noise schedule. It says how to complete it."""
    problem = f"{path}: the noise schedule is missing"
    if any((folder / FILE).is_file() for folder in (root.parent / "scheduler", root.parent)):
        return TeacherNotFoundError(
            f"{problem}; pass {root.parent}, the directory of the whole model"
        )
    return TeacherError(
        f"{problem}; expected scheduler/{FILE}; a training checkpoint has none, copy scheduler/ "
        "from the model that was trained"
    )


def _hashable(value: Any) -> Any:
    """Return a JSON value with Infinity, -Infinity and NaN as strings, which JSON cannot write.

    Configurations of DPM-Solver have lambda_min_clipped -Infinity.
    """
    if isinstance(value, dict):
        return {key: _hashable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hashable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
