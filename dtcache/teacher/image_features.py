"""A teacher in memory: the features of a batch of images, without a cache."""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from dtcache.arguments import list_of, require, require_count
from dtcache.device import resolve_compute
from dtcache.errors import ConfigError
from dtcache.recipe import ViewSpec
from dtcache.teacher.load import load_teacher as load
from dtcache.teacher.loaded_teacher import LoadedTeacher
from dtcache.teacher.teacher import TeacherSettings, prepare_teacher


class ImageTeacher:
    """A loaded teacher that computes the features of images that are already in memory."""

    def __init__(self, loaded: LoadedTeacher, device: str, precision: str) -> None:
        """Take a loaded teacher, a device (auto, cpu or cuda) and a precision (auto, fp32...)."""
        require("loaded", loaded, LoadedTeacher, "a LoadedTeacher")
        self._loaded = loaded
        self._compute = resolve_compute(device, precision)

    def features(
        self,
        images: Tensor,
        timestep: int | None = None,
        *,
        taps: Sequence[str] | None = None,
        seed: int = 0,
        keys: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Return the features of B images by array, fp32 (B, C, H, W), in the teacher's own scale.

        `images` are uint8 RGB (B, 3, H, W) in 0..255, and `timestep` is a step of the teacher's
        noise schedule; None for a teacher that takes no noise. `taps` are names such as stride8;
        None takes the default ones. The noise of an image is a function of (`seed`, its key,
        `timestep`); `keys` default to the positions 0, 1, ... With the seed and keys of a cache it
        is the noise of the cache's first draw. No gradient is recorded. Raises ConfigError with the
        argument's name.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            raise ConfigError(
                "`images`: expected a uint8 tensor (B, 3, H, W) in 0..255; convert them"
            )
        if images.dim() != 4 or images.shape[1] != 3 or not len(images):
            raise ConfigError(
                f"`images`: expected (B, 3, H, W), got {tuple(images.shape)}; reshape it"
            )
        names = [str(position) for position in range(len(images))]
        if keys is not None:
            names = list_of("keys", keys, str, "keys")
        if len(names) != len(images):
            raise ConfigError(
                f"`keys`: expected a list of {len(images)} keys, one per image, got {len(names)}; "
                "pass such a list"
            )
        if timestep is None:
            if self._loaded.has_timesteps:
                raise ConfigError("`timestep`: expected a step of the noise schedule; pass one")
            timestep = 0
        require("timestep", timestep, Integral, "an integer")
        require_count("seed", seed, 0)
        if taps is not None:
            taps = list_of("taps", taps, str, "taps")
            if not taps:
                raise ConfigError("`taps`: expected one or more taps, got none; pass None for all")
        _, _, height, width = images.shape
        settings = TeacherSettings(
            view=ViewSpec(height=height, width=width),
            timesteps=(timestep,),
            batch_size=len(images),
            taps=tuple(taps) if taps is not None else None,
        )
        teacher = prepare_teacher(self._loaded, settings, self._compute)
        pixels = images.cpu().numpy()
        inputs = [
            teacher.input(image, key, False, seed=seed, draws=(0,))
            for image, key in zip(pixels, names, strict=True)
        ]
        (features,) = teacher.features(teacher.batch(inputs))
        return {name: maps.clone() for name, maps in features.items()}


def load_teacher(
    where: str | Path, *, device: str = "auto", precision: str = "auto", prompt: str | None = None
) -> ImageTeacher:
    """Load a teacher, to look at its features: a diffusers folder or id, or `timm:` and a name.

    `features` of the result gives features of images, fp32 (B, C, H, W). Raises
    TeacherNotFoundError or TeacherError, and ConfigError for an unknown `device` or `precision`.
    """
    require("where", where, str | Path, "a folder or a name of the hub")
    require("device", device, str, "a str")
    require("precision", precision, str, "a str")
    if prompt is not None:
        require("prompt", prompt, str, "a str")
    return ImageTeacher(load(str(where), prompt=prompt), device, precision)
