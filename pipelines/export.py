"""`dtcache export`: a trained backbone for timm or torchvision, checked against the original."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dtcache.atomic_files import whole_folder, write_file
from dtcache.errors import ConfigError, ExportError, one_line
from dtcache.options import ExportOptions
from dtcache.student import Backbone, load_backbone
from dtcache.student.backbone_io import open_in_timm
from dtcache.student.torchvision import torchvision_network
from dtcache.student.weights_io import CONFIG, WEIGHTS
from pipelines.runs.folder import BACKBONE

TOLERANCE = 1e-5
"""Largest difference of the outputs over the largest output; summation order causes some."""
NUM_IMAGES = 2
"""Random images on which both networks are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """An exported folder, and the comparison of its network with the original."""

    out: Path
    architecture: str
    difference: float
    """Largest absolute difference of the outputs."""
    largest: float
    """Largest absolute output."""
    usage: str
    """Python code that loads the network."""


def export(source: Path, out: Path, options: ExportOptions) -> Exported:
    """Export the backbone of a run, or a backbone folder, to a new folder.

    The exported network is read back and run on random images. The folder appears only if its
    outputs agree with those of the original. Raises ConfigError for a backbone that cannot be
    exported, ExportError if the outputs differ, and DiskError.
    """
    folder = backbone_folder(source)
    if out.exists():
        raise ConfigError(f"`out` {out}: expected a new folder, got one that exists")
    backbone, size, _ = load_backbone(folder)
    backbone.require_size(size)
    backbone.eval()
    with whole_folder(out) as draft:
        write = _write_timm if options.to == "timm" else _write_torchvision
        network, usage = write(folder, draft, backbone, size)
        difference, largest = compare(backbone.model, network, size)
        if not difference <= TOLERANCE * max(largest, 1e-6):
            raise ExportError(
                f"{folder}: {options.to}'s {backbone.name} gives other outputs than the original: "
                f"they differ by {difference:.3g} of {largest:.3g}; nothing was exported. Report "
                "this with the versions of both libraries"
            )
    return Exported(
        out=out,
        architecture=backbone.name,
        difference=difference,
        largest=largest,
        usage=usage.format(out=out),
    )


def backbone_folder(source: Path) -> Path:
    """Return the backbone folder of `source`: that folder itself, or the one in a finished run.

    Raises ConfigError if there is none.
    """
    if (source / CONFIG).is_file():
        return source
    if (source / BACKBONE / CONFIG).is_file():
        return source / BACKBONE
    if (source / "run.json").is_file():
        raise ConfigError(
            f"{source}: the run has no backbone yet; run its dtcache train command again to "
            "finish it"
        )
    raise ConfigError(
        f"{source}: expected a run of dtcache train, or a backbone folder with {CONFIG}"
    )


@torch.inference_mode()
def compare(original: nn.Module, network: nn.Module, size: tuple[int, int]) -> tuple[float, float]:
    """Return the largest absolute difference of two networks' outputs, and the largest output.

    `size` is the (height, width) of the random images. The difference is infinite if the shapes
    differ or if an output is not finite.
    """
    images_BCHW = torch.randn(NUM_IMAGES, 3, *size, generator=torch.Generator().manual_seed(0))
    outputs: list[Tensor] = [net.eval()(images_BCHW) for net in (original, network)]
    largest = float(outputs[0].abs().max())
    if outputs[0].shape != outputs[1].shape or not all(bool(x.isfinite().all()) for x in outputs):
        return float("inf"), largest
    return float((outputs[0] - outputs[1]).abs().max()), largest


def _write_timm(
    folder: Path, draft: Path, backbone: Backbone, size: tuple[int, int]
) -> tuple[nn.Module, str]:
    """Copy a backbone folder, which timm can read, and load it with timm."""
    for name in (WEIGHTS, CONFIG):
        write_file(draft / name, (folder / name).read_bytes())
    usage = 'timm.create_model("local-dir:{out}", pretrained=True, num_classes=0)'
    try:
        return open_in_timm(draft), usage
    except Exception as error:  # timm passes unknown fields on, so the type may be any.
        raise ExportError(
            f"{folder / CONFIG}: timm cannot open the backbone ({one_line(error)}). Export the "
            "backbone of the run that it came from"
        ) from error


def _write_torchvision(
    folder: Path, draft: Path, backbone: Backbone, size: tuple[int, int]
) -> tuple[nn.Module, str]:
    """Write a state dict and its input normalisation; load it with torchvision, strictly."""
    network, head = torchvision_network(backbone)
    weights = {name: value.contiguous() for name, value in backbone.model.state_dict().items()}
    write_file(draft / WEIGHTS, safetensors.torch.save(weights, {"format": "pt"}))
    config: dict[str, Any] = {
        "library": "torchvision",
        "architecture": backbone.name,
        "removed_head": head,
        "input_size": [3, *size],
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }
    write_file(draft / CONFIG, json.dumps(config, indent=1).encode())
    network.load_state_dict(safetensors.torch.load_file(draft / WEIGHTS), strict=True)
    usage = (
        f"net = torchvision.models.{backbone.name}(); net.{head} = torch.nn.Identity(); "
        'net.load_state_dict(safetensors.torch.load_file("{out}/' + WEIGHTS + '"))'
    )
    return network, usage
