"""A noise schedule is read from the settings of any sampler, or refused as another process."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from teacher.kinds import save_class_unet

from dtcache.device import resolve_compute
from dtcache.errors import ConfigError, TeacherError, TeacherNotFoundError
from dtcache.hashing import canonical_json, sha256_json
from dtcache.recipe import ViewSpec
from dtcache.teacher import TeacherSettings, load_teacher, prepare_teacher
from dtcache.teacher.noise_schedule import FOREIGN, SCHEDULERS, SETTINGS, read_schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def save(root: Path, name: str, **settings: Any) -> None:
    """Write a scheduler's file that holds these settings alone."""
    (root / "scheduler").mkdir(exist_ok=True)
    path = root / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": name, **settings}))


def is_installed(name: str) -> bool:
    """Return whether diffusers has this class: some need a package that is not installed."""
    return "args" not in inspect.signature(getattr(diffusers, name).__init__).parameters


def settings_of(name: str) -> dict[str, Any]:
    """Return the betas of Stable Diffusion; UnCLIPScheduler has none to choose."""
    return {} if name == "UnCLIPScheduler" else BETAS


@pytest.mark.parametrize("name", sorted(filter(is_installed, SCHEDULERS)))
def test_every_sampler_gives_its_own_alpha_bars(name: str, tmp_path: Path) -> None:
    """alpha-bar equals that of the diffusers class, for given betas and for its defaults."""
    cls = getattr(diffusers, name)
    scheduler = cls(**settings_of(name))
    scheduler.save_pretrained(tmp_path / "scheduler")
    schedule = read_schedule(tmp_path)
    torch.testing.assert_close(schedule.alpha_bars, scheduler.alphas_cumprod.float())
    if name != "UnCLIPScheduler":
        roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
        expected = torch.cumprod(1 - roots.square(), 0)
        torch.testing.assert_close(schedule.alpha_bars.double(), expected, rtol=1e-4, atol=1e-6)
    assert schedule.prediction == "epsilon"
    save(tmp_path, name)
    torch.testing.assert_close(
        read_schedule(tmp_path).alpha_bars, cls().alphas_cumprod.float(), rtol=1e-5, atol=1e-7
    )


def test_a_sampler_that_is_not_installed_needs_no_class(tmp_path: Path) -> None:
    """The betas of DPMSolverSDEScheduler, which needs torchsde, are read without its class."""
    save(tmp_path, "DPMSolverSDEScheduler")
    expected = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(
        read_schedule(tmp_path).alpha_bars.double(), expected, rtol=1e-4, atol=1e-6
    )


def other_schedulers() -> list[str]:
    """Return every other scheduler of diffusers that is made without arguments."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    without_arguments = []
    for name in filter(is_installed, sorted(set(names) - SCHEDULERS.keys())):
        _, *parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
        if all(parameter.default is not parameter.empty for parameter in parameters):
            without_arguments.append(name)
    return without_arguments


@pytest.mark.parametrize("name", other_schedulers())
def test_every_other_scheduler_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """A scheduler of another noise process, or of tokens, is refused."""
    getattr(diffusers, name)().save_pretrained(tmp_path / "scheduler")
    message = f"expected the scheduler of a variance-preserving model, got '{name}'"
    with pytest.raises(TeacherError, match=message):
        read_schedule(tmp_path)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, r"with use_flow_sigmas \(flow matc"),
        (
            "DEISMultistepScheduler",
            {"prediction_type": "flow_prediction"},
            r"with prediction_type 'flow_prediction' \(flow matching\)",
        ),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            r"with timestep_type 'continuous' \(EDM\); dtcache cannot noise images",
        ),
        ("DPMSolverMultistepScheduler", {"shift": 3.0}, r"with shift 3\.0 \(flow matching\)"),
        ("DPMSolverMultistepScheduler", {"sigma_data": 0.5}, r"with sigma_data 0\.5 \(EDM\)"),
        ("DDIMScheduler", {"snr_shift_scale": 3.0}, r"with snr_shift_scale 3\.0 \(shifted noise"),
        (
            "DDPMScheduler",
            {"prediction_type": "score"},
            "expected prediction_type epsilon, v_prediction, sample, .*, got 'score'",
        ),
        (
            "DDPMScheduler",
            {"_class_name": ["x"]},
            r"expected the scheduler .*, got \['x'\]; dtc",
        ),
        ("DDPMScheduler", {"prediction_type": ["v"]}, r"expected prediction_type .*, got \['v'\]"),
        ("DDPMScheduler", {"prediction_type": None}, "expected prediction_type .*, got None"),
        ("DDPMScheduler", {"num_train_timesteps": 0}, "num_train_timesteps from 1 to .*, got 0"),
        ("DDPMScheduler", {"num_train_timesteps": 10**12}, "got 1000000000000; download it again"),
        ("DDPMScheduler", {"num_train_timesteps": "many"}, "num_train_timesteps .*, got 'many'"),
        ("DDPMScheduler", {"beta_end": float("inf")}, "betas from 0 to 1, got beta_end inf"),
        ("DDPMScheduler", {"beta_end": float("nan")}, "betas from 0 to 1, got beta_end nan"),
        ("DDPMScheduler", {"beta_end": 2.0}, "betas from 0 to 1, got beta_end 2.0"),
        ("DDPMScheduler", {"trained_betas": []}, r"betas from 0 to 1, got trained_betas \[\]"),
        ("DDPMScheduler", {"trained_betas": [0.1, -0.5]}, r"got trained_betas \[0.1, -0.5\]"),
        ("DDPMScheduler", {"beta_end": "big"}, r"diffusers cannot make this noise schedule \("),
        ("DDPMScheduler", {"beta_schedule": "x"}, r"cannot make this noise schedule \(x is not im"),
    ],
)
def test_settings_of_another_process_are_refused(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The settings tell the noise process, not the class; impossible values are refused too."""
    save(tmp_path, name, **settings)
    with pytest.raises(TeacherError, match=message):
        read_schedule(tmp_path)


def test_settings_of_other_processes_belong_to_no_sampler() -> None:
    """No sampler of a variance-preserving model has a setting that marks another process."""
    for name in filter(is_installed, SCHEDULERS):
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert not FOREIGN.keys() & parameters.keys(), name
        for key, value in SCHEDULERS[name].items():
            assert parameters[key].default == value, (name, key)
            assert key in SETTINGS


@pytest.mark.parametrize(
    ("settings", "prediction"),
    [
        ({}, "epsilon"),
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"prediction_type": "original_sample"}, "sample"),
        ({"predict_epsilon": False}, "sample"),
        ({"predict_epsilon": True}, "epsilon"),
    ],
)
def test_the_prediction_is_read_under_all_its_names(
    settings: dict[str, Any], prediction: str, tmp_path: Path
) -> None:
    """diffusers has had several names for what a network predicts."""
    save(tmp_path, "DDPMScheduler", **settings)
    assert read_schedule(tmp_path).prediction == prediction


def test_numbers_that_are_not_finite_are_read_and_hashed(tmp_path: Path) -> None:
    """Infinity and NaN in settings of the sampler become strings; other values stay themselves."""
    numbers = {"a": float("-inf"), "b": [float("inf")], "c": {"d": float("nan")}}
    save(tmp_path, "DPMSolverSinglestepScheduler", **BETAS, **numbers)
    config = read_schedule(tmp_path).config
    text = {"a": "-Infinity", "b": ["Infinity"], "c": {"d": "NaN"}}
    assert config == {"_class_name": "DPMSolverSinglestepScheduler", **BETAS, **text}
    assert len(canonical_json(config)) > 0
    save(tmp_path, "DDPMScheduler", **BETAS)
    assert read_schedule(tmp_path).config == {"_class_name": "DDPMScheduler", **BETAS}


def test_a_teacher_saved_with_dpm_solver_loads(tmp_path: Path) -> None:
    """A pipeline's directory with DPM-Solver, whose file has -Infinity, loads as any other."""
    save_class_unet(tmp_path)
    before = load_teacher(str(tmp_path))
    path = tmp_path / "scheduler" / "scheduler_config.json"
    hashed = [json.loads((tmp_path / "unet" / "config.json").read_text())]
    assert before.config_sha256 == sha256_json([*hashed, json.loads(path.read_text())])
    diffusers.DPMSolverMultistepScheduler().save_pretrained(tmp_path / "scheduler")
    assert "-Infinity" in path.read_text()
    after = load_teacher(str(tmp_path))
    assert torch.equal(after.alpha_bars, before.alpha_bars)
    assert after.config_sha256 != before.config_sha256


def test_exponential_betas_are_heuns(tmp_path: Path) -> None:
    """The betas that HeunDiscreteScheduler alone has are read as that class makes them."""
    scheduler = HeunDiscreteScheduler(beta_schedule="exp")
    scheduler.save_pretrained(tmp_path / "scheduler")
    schedule = read_schedule(tmp_path)
    torch.testing.assert_close(schedule.alpha_bars, scheduler.alphas_cumprod)
    assert schedule.kind == "exp"


def test_a_timestep_without_signal_is_refused(tmp_path: Path) -> None:
    """With zero terminal SNR, the last timestep is refused and the one before is not."""
    save_class_unet(tmp_path)
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = load_teacher(str(tmp_path))
    torch.testing.assert_close(loaded.alpha_bars, scheduler.alphas_cumprod)
    assert float(loaded.alpha_bars[-1]) == 0.0 < float(loaded.alpha_bars[-2])

    def prepare(timestep: int) -> None:
        settings = TeacherSettings(
            view=ViewSpec(height=32, width=32), timesteps=(timestep,), batch_size=1, condition="0"
        )
        prepare_teacher(loaded, settings, resolve_compute("cpu", "fp32"))

    prepare(998)
    with pytest.raises(ConfigError, match=r"`timestep` 999: alpha-bar is 0 there, so the network"):
        prepare(999)


def test_a_missing_schedule_names_where_it_is(tmp_path: Path) -> None:
    """The unet/ of a model names the model's directory; a checkpoint says what to copy."""
    save_class_unet(tmp_path)
    with pytest.raises(TeacherNotFoundError, match=rf"is missing; pass {tmp_path}, the directory"):
        load_teacher(str(tmp_path / "unet"))
    (tmp_path / "scheduler").rename(tmp_path / "elsewhere")
    with pytest.raises(TeacherError, match=r"training checkpoint has none, copy scheduler"):
        load_teacher(str(tmp_path))
