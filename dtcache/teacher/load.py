"""Loading a diffusers teacher from disk or hub: JSON and safetensors only, and nothing that it brings is run."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from dtcache.errors import TeacherError, TeacherNotFoundError
from dtcache.spec import sha256_json
from dtcache.teacher.denoiser import Denoiser
from dtcache.teacher.encoding import Encoding
from dtcache.teacher.unet import UNetDenoiser

WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
ARCHITECTURES = ("UNet2DModel",)
# Schedulers of variance-preserving models: the same betas, whatever sampler the file names (design: trap 4).
SCHEDULERS = frozenset(
    {
        "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
        "HeunDiscreteScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedTeacher:
    """A network and its noise schedule, with the hashes that name them."""

    denoiser: Denoiser
    """fp32, in evaluation mode, on the CPU."""
    alpha_bars: torch.Tensor
    """fp32 (steps,): cumulative product of 1 - beta."""
    architecture: str
    weights_sha256: str
    config_sha256: str
    schedule: str = "unknown"
    """Kind of the betas, such as linear."""
    prediction: str = "epsilon"
    """What the network predicts, by diffusers' name."""
    encoding: Encoding | None = None
    """How images become its inputs, where it is not for the schedule to say."""


def load_teacher(where: str) -> LoadedTeacher:
    """Load a UNet2DModel from a directory (unet/ + scheduler/, or flat as google/ddpm-*) or a Hugging Face id.

    Raises TeacherNotFoundError where a part is missing and TeacherError where it is not one that can be used safely.
    """
    root = _locate(where)
    folder = root / "unet" if (root / "unet").is_dir() else root
    config = _read_config(folder / "config.json", "the U-Net's configuration")
    name = config.get("_class_name")
    if name not in ARCHITECTURES:
        raise TeacherError(
            f"{folder / 'config.json'}: expected _class_name {' or '.join(ARCHITECTURES)}, got {name!r}; "
            "dtcache cannot tap this kind of model"
        )
    if config.get("in_channels") != 3 or config.get("num_class_embeds") or config.get("class_embed_type"):
        raise TeacherError(
            f"{folder / 'config.json'}: expected an unconditional model of RGB pixels, got in_channels="
            f"{config.get('in_channels')}, num_class_embeds={config.get('num_class_embeds')}"
        )
    schedule = _scheduler_config(root)
    weights = _weights(folder)
    try:
        unet, info = UNet2DModel.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, torch_dtype=torch.float32,
            local_files_only=True,
        )  # fmt: skip
        alpha_bars = DDPMScheduler.from_config(schedule).alphas_cumprod.float()
    except Exception as error:  # whatever diffusers makes of a truncated or contradictory directory
        reason = " ".join(str(error).split())[:300]
        raise TeacherError(
            f"{root}: diffusers cannot load this teacher ({reason}); save or download it again"
        ) from error
    # A missing key would leave uninitialised memory in the network, without a word (design: trap 1).
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        kind, keys = next(iter(wrong.items()))
        raise TeacherError(
            f"{weights}: the weights do not fit {folder / 'config.json'}: {len(keys)} {kind}, such as "
            f"{next(iter(keys))}; the two files belong to different models"
        )
    return LoadedTeacher(
        denoiser=UNetDenoiser(unet.eval().requires_grad_(False)),
        alpha_bars=alpha_bars,
        architecture=name,
        weights_sha256=_sha256_file(weights),
        config_sha256=sha256_json([config, schedule]),
        schedule="given" if schedule.get("trained_betas") else str(schedule.get("beta_schedule", "linear")),
        prediction=str(schedule.get("prediction_type", "epsilon")),
    )


def _locate(where: str) -> Path:
    """Return the teacher's directory, downloading JSON and safetensors where a hub id is given."""
    path = Path(where)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", where) or where.startswith("."):
        raise TeacherNotFoundError(
            f"teacher {where}: no such directory; expected a diffusers directory or a Hugging Face id such as "
            "google/ddpm-church-256"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(where, allow_patterns=["*.json", f"*{WEIGHTS}"]))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise TeacherNotFoundError(
            f"teacher {where}: neither a directory here nor a model that the Hugging Face hub served ({reason}); "
            "check the name, the network, or give a directory"
        ) from error


def _read_config(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise TeacherNotFoundError(f"{path}: {what} is missing; expected a directory saved by save_pretrained")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise TeacherError(f"{path}: expected at most {MAX_CONFIG_BYTES} bytes of JSON, got {path.stat().st_size}")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise TeacherError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise TeacherError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _scheduler_config(root: Path) -> dict[str, Any]:
    nested = root / "scheduler" / "scheduler_config.json"
    path = nested if nested.is_file() else root / "scheduler_config.json"
    config = _read_config(path, "the noise schedule")
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise TeacherError(f"{path}: expected the scheduler of a variance-preserving model, got {name!r}")
    return config


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if path.is_file():
        return path
    pickled = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(suffix))
    if pickled:
        raise TeacherError(
            f"{folder}: only pickled weights ({', '.join(pickled)}), which dtcache never loads because unpickling runs "
            f"code; expected {WEIGHTS}: load the model where you trust it and save_pretrained(safe_serialization=True)"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    hint = f"; found {', '.join(others)}: rename the full-precision file" if others else ""
    raise TeacherNotFoundError(f"{path}: the weights are missing{hint}")


def _sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
