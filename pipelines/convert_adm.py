"""`dtcache teacher convert`: turn an OpenAI ADM checkpoint into a diffusers folder."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtcache._version import __version__
from dtcache.atomic_files import disk_errors, whole_folder, write_file
from dtcache.errors import ConfigError, TeacherError
from dtcache.hashing import file_sha256
from dtcache.options import ConvertOptions
from dtcache.teacher.adm.architecture import (
    PRESETS,
    AdmArchitecture,
    AdmSettings,
    fits_preset,
    infer_architecture,
    match_preset,
    scheduler_config,
    unet_config,
)
from dtcache.teacher.adm.checkpoint import read_checkpoint
from dtcache.teacher.adm.weights import blank_unet, convert_weights, save_converted
from pipelines.terminal.progress import track

RECORD = "conversion.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """A finished conversion."""

    out: Path
    architecture: AdmArchitecture
    settings: AdmSettings
    preset: str | None
    """Name of the published architecture, or None for a custom one."""
    parameters: int

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the decoder's taps, one per level, finest first."""
        return tuple(2**level for level in range(len(self.architecture.channels)))

    @property
    def summary(self) -> str:
        """One line: folder, architecture, assumed settings, taps."""
        s = self.settings
        channels = self.architecture.channels
        classes = self.architecture.classes
        heads = f"{s.heads} heads" if s.heads else f"heads of {s.head_channels} channels"
        return (
            f"{self.out}: {self.preset or 'a custom architecture'} at {s.size} px, "
            f"{self.parameters / 1e6:.1f}M parameters, "
            f"{f'{classes} classes' if classes else 'unconditional'}; {s.schedule} schedule, "
            f"{heads} in {s.order} order; channels {', '.join(map(str, channels))}; "
            f"taps at strides {', '.join(map(str, self.strides))}"
        )


def convert_adm(checkpoint: Path, out: Path, options: ConvertOptions) -> Converted:
    """Write a UNet2DModel folder that is equivalent to a guided-diffusion (ADM) checkpoint.

    The folder has unet/, scheduler/ and conversion.json. It appears complete or not at all. If
    `out` holds the same conversion already, nothing is written. Raises ConfigError for options that
    contradict the checkpoint and for an `out` with other files, TeacherError for a file that is not
    an ADM checkpoint, and DiskError.
    """
    out = out.resolve()
    with disk_errors(out):
        occupied = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if occupied and not (out / RECORD).is_file():
        raise ConfigError(
            f"`out` {out}: expected a new or empty folder, got other files; pass another `out`"
        )
    with track("convert", 4) as progress:
        weights = read_checkpoint(checkpoint)
        progress.advance(1, "read")
        try:
            architecture = infer_architecture(weights)
            preset, settings = resolve_settings(architecture, options)
            unet = blank_unet(unet_config(architecture, settings))
            shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
            converted = _stored(
                convert_weights(weights, architecture, settings, shapes),
                half=options.weights == "fp16",
            )
        except TeacherError as error:
            raise TeacherError(f"{checkpoint}: {error}") from error
        progress.advance(1, "converted")
        record = _record(checkpoint, architecture, settings, half=options.weights == "fp16")
        progress.advance(1, "hashed")
        if not occupied:
            with whole_folder(out) as folder:
                config = scheduler_config(architecture, settings)
                save_converted(folder, unet, converted, config)
                write_file(folder / RECORD, record)
        elif not _holds(out / RECORD, record):
            raise ConfigError(
                f"`out` {out} holds another conversion; remove it or pass another `out`"
            )
        progress.advance(1, "written")
    parameters = sum(tensor.numel() for tensor in weights.values())
    return Converted(
        out=out,
        architecture=architecture,
        settings=settings,
        preset=preset,
        parameters=parameters,
    )


def resolve_settings(
    architecture: AdmArchitecture, options: ConvertOptions
) -> tuple[str | None, AdmSettings]:
    """Return the preset's name, if any, and the settings that the weights' shapes do not determine.

    Options win over the preset, the preset over guided-diffusion's defaults. Raises ConfigError if
    options contradict each other or the architecture.
    """
    levels = list(architecture.channels)
    preset = match_preset(architecture) if options.preset == "auto" else options.preset
    if preset is not None and not fits_preset(architecture, preset):
        channels, blocks, _ = PRESETS[preset]
        raise ConfigError(
            f"`preset='{preset}'`: expected levels of {list(channels)} channels and {blocks} "
            f"blocks, the checkpoint has {levels} and {architecture.blocks}; leave `preset` out"
        )
    if preset is None and options.size is None:
        raise ConfigError(
            f"`size`: levels of {levels} channels and {architecture.blocks} blocks are none of "
            "OpenAI's published models; pass the image size of its training, and `schedule`, "
            "`attention_order` and `heads` or `head_channels` if its training changed "
            "guided-diffusion's defaults"
        )
    if options.heads and options.head_channels:
        raise ConfigError(
            "`heads` and `head_channels`: expected one of them; the other follows from it"
        )
    chosen: dict[str, Any] = {
        "size": options.size,
        "heads": options.heads,
        "head_channels": options.head_channels,
        "schedule": options.schedule,
        "order": options.attention_order,
    }
    chosen = {name: value for name, value in chosen.items() if value not in (None, "auto")}
    if options.heads or options.head_channels:
        chosen = {"heads": None, "head_channels": None, **chosen}
    # guided-diffusion's default is four heads.
    base = AdmSettings(size=1, heads=4) if preset is None else PRESETS[preset][2]
    settings = replace(base, **chosen)
    coarsest = 2 ** (len(levels) - 1)
    if settings.size % coarsest:
        raise ConfigError(
            f"`size` {settings.size}: expected a multiple of {coarsest}, the coarsest level's "
            "stride"
        )
    return preset, settings


def _stored(tensors: dict[str, Tensor], *, half: bool) -> dict[str, Tensor]:
    """Return the tensors in the stored dtype, fp16 or fp32.

    Raises TeacherError if a value is not finite in that dtype.
    """
    dtype = torch.float16 if half else torch.float32
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            advice = "download the checkpoint again"
            if half:
                advice = f"pass `weights='fp32'`, or {advice}"
            raise TeacherError(
                f"{name} has values that are not finite in {'fp16' if half else 'fp32'}; {advice}"
            )
    return stored


def _record(
    checkpoint: Path, architecture: AdmArchitecture, settings: AdmSettings, *, half: bool
) -> bytes:
    """Return `conversion.json`: a function of the checkpoint, options and dtcache's version."""
    source = {
        "name": checkpoint.name,
        "bytes": checkpoint.stat().st_size,
        "sha256": file_sha256(checkpoint),
    }
    record = {
        "source": source,
        "architecture": asdict(architecture),
        "settings": asdict(settings),
        "half": half,
        "dtcache": __version__,
    }
    return (json.dumps(record, indent=2) + "\n").encode()


def _holds(path: Path, content: bytes) -> bool:
    """Return whether a file consists of exactly `content`."""
    with disk_errors(path):
        return path.stat().st_size == len(content) and path.read_bytes() == content
