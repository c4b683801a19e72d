"""Stage 0, another way: an OpenAI guided-diffusion (ADM) checkpoint becomes a diffusers directory to extract with."""

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
    """What a finished conversion left behind."""

    out: Path
    found: AdmArchitecture
    settings: AdmSettings
    preset: str | None
    """Name of the published architecture, None for another."""
    parameters: int

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the decoder's taps, one a level, finest first."""
        return tuple(2**level for level in range(len(self.found.channels)))

    @property
    def summary(self) -> str:
        """One line: where, what it is, what it was taken to be, what it offers."""
        s = self.settings
        found = self.found
        heads = f"{s.heads} heads" if s.heads else f"heads of {s.head_channels} channels"
        return (
            f"{self.out}: {self.preset or 'an own architecture'} at {s.size} px, {self.parameters / 1e6:.1f}M "
            f"parameters, {f'{found.classes} classes' if found.classes else 'unconditional'}; {s.schedule} schedule, "
            f"{heads} in {s.order} order; channels {', '.join(map(str, found.channels))}; "
            f"taps at strides {', '.join(map(str, self.strides))}"
        )


def convert_adm(checkpoint: Path, out: Path, options: ConvertOptions) -> Converted:
    """Write a UNet2DModel directory (unet/, scheduler/, conversion.json) that computes what the checkpoint does.

    The directory appears whole or not at all. One that the same conversion made is left as it is. Raises ConfigError
    for options that do not fit the checkpoint, TeacherError for a file that is no such checkpoint or for an `out`
    that holds something else, and DiskError.
    """
    out = out.resolve()
    with disk_errors(out):
        occupied = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if occupied and not (out / RECORD).is_file():
        raise TeacherError(f"{out} holds something else; give a missing or empty folder as --out")
    with track("convert", 4) as progress:
        weights = read_checkpoint(checkpoint)
        progress.advance(1, "read")
        try:
            found = infer_architecture(weights)
            preset, settings = resolve_settings(found, options)
            unet = blank_unet(unet_config(found, settings))
            shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
            converted = _stored(
                convert_weights(weights, found, settings, shapes), half=options.half
            )
        except TeacherError as error:
            raise TeacherError(f"{checkpoint}: {error}") from error
        progress.advance(1, "converted")
        record = _record(checkpoint, found, settings, half=options.half)
        progress.advance(1, "hashed")
        if not occupied:
            with whole_folder(out) as folder:
                save_converted(folder, unet, converted, scheduler_config(found, settings))
                write_file(folder / RECORD, record)
        elif not _is(out / RECORD, record):
            raise TeacherError(f"{out} holds another conversion; remove it or give another --out")
        progress.advance(1, "written")
    parameters = sum(tensor.numel() for tensor in weights.values())
    return Converted(out=out, found=found, settings=settings, preset=preset, parameters=parameters)


def resolve_settings(
    found: AdmArchitecture, options: ConvertOptions
) -> tuple[str | None, AdmSettings]:
    """Return the preset's name, if any, and what the shapes do not tell: options before preset before defaults.

    Raises ConfigError where they contradict each other or the architecture.
    """
    preset = match_preset(found) if options.preset == "auto" else options.preset
    if preset is not None and not fits_preset(found, preset):
        channels, blocks, _ = PRESETS[preset]
        raise ConfigError(
            f"--preset {preset}: expected levels of {list(channels)} channels and {blocks} blocks, the checkpoint has "
            f"{list(found.channels)} and {found.blocks}; leave --preset out"
        )
    if preset is None and options.size is None:
        raise ConfigError(
            f"--size: levels of {list(found.channels)} channels and {found.blocks} blocks are none of OpenAI's "
            "published models; give the image size that it was trained with, and --schedule, --attention-order and "
            "--heads or --head-channels where its training changed guided-diffusion's defaults"
        )
    if options.heads and options.head_channels:
        raise ConfigError("--heads and --head-channels: expected one of them; the other follows")
    chosen: dict[str, Any] = {
        "size": options.size,
        "heads": options.heads,
        "head_channels": options.head_channels,
    }
    chosen |= {"schedule": options.schedule, "order": options.attention_order}
    chosen = {name: value for name, value in chosen.items() if value not in (None, "auto")}
    if options.heads or options.head_channels:
        chosen = {"heads": None, "head_channels": None, **chosen}
    # guided-diffusion's default is four heads.
    base = AdmSettings(size=1, heads=4) if preset is None else PRESETS[preset][2]
    settings = replace(base, **chosen)
    coarsest = 2 ** (len(found.channels) - 1)
    if settings.size % coarsest:
        raise ConfigError(
            f"--size {settings.size}: expected a multiple of {coarsest}, the coarsest level's stride"
        )
    return preset, settings


def _stored(tensors: dict[str, Tensor], *, half: bool) -> dict[str, Tensor]:
    """Return the tensors as they are stored. Raises TeacherError where a value is not finite in that type."""
    dtype = torch.float16 if half else torch.float32
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            advice = "leave --half out, or download it again" if half else "download it again"
            raise TeacherError(
                f"{name}, as it would be stored, has values that are not finite; {advice}"
            )
    return stored


def _record(
    checkpoint: Path, found: AdmArchitecture, settings: AdmSettings, *, half: bool
) -> bytes:
    """Return the provenance of a conversion: a function of the checkpoint, the options and dtcache's version."""
    source = {
        "name": checkpoint.name,
        "bytes": checkpoint.stat().st_size,
        "sha256": file_sha256(checkpoint),
    }
    made = {
        "source": source,
        "architecture": asdict(found),
        "settings": asdict(settings),
        "half": half,
    }
    return (json.dumps({**made, "dtcache": __version__}, indent=2) + "\n").encode()


def _is(path: Path, content: bytes) -> bool:
    """Return whether a file holds exactly `content`."""
    with disk_errors(path):
        return path.stat().st_size == len(content) and path.read_bytes() == content
