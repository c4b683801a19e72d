"""A loaded teacher: a network, how images become its input, and the hashes that identify both."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dtcache.teacher.autoencoder import LatentEncoder
from dtcache.teacher.denoiser import Denoiser
from dtcache.teacher.noising import Encoding
from dtcache.teacher.prompt import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedTeacher:
    """A network and its noise schedule, with the hashes that identify them."""

    denoiser: Denoiser
    """fp32, in evaluation mode, on the CPU."""
    alpha_bars: torch.Tensor
    """fp32 (steps,): cumulative product of 1 - beta."""
    architecture: str
    weights_sha256: str
    """Over the weight files of every network that an image passes through."""
    config_sha256: str
    schedule: str = "unknown"
    """Kind of the betas, such as linear; none if the teacher takes no noise."""
    prediction: str = "epsilon"
    """diffusers' name of the network's prediction; features if it predicts no noise."""
    encoding: Encoding | None = None
    """How images become the network's input; None if the noise schedule defines it."""
    latents: LatentEncoder | None = None
    """The encoder from pixels to the network's input; None if the network reads pixels."""
    prompt: Prompt | None = None
    """The prompt and its embedding; None if the network is not conditioned on text."""
    class_names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Names of the classes by number, if the model's files record them."""
    warnings: tuple[str, ...] = ()
    """What a user should check: parts and inputs that are not used, an uncertain scale."""
    notes: tuple[str, ...] = ()
    """What a user should know about the maps, such as tokens that no map holds."""

    @property
    def has_timesteps(self) -> bool:
        """Whether there are several timesteps; a teacher without noise has one, 0."""
        return len(self.alpha_bars) > 1

    @property
    def latent_stride(self) -> int:
        """Pixels of a view per row of the network's input."""
        return self.latents.stride if self.latents is not None else 1
