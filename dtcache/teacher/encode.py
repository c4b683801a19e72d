"""One denoising pass: uint8 views in, decoder features out (paper: feature dataset, stochastic encoding)."""

import numpy as np
import torch
from torch import Tensor

from dtcache.device import Compute
from dtcache.errors import ConfigError
from dtcache.spec import TapSpec, TeacherSpec, ViewSpec
from dtcache.teacher.load import LoadedTeacher
from dtcache.teacher.noise import sample_noise
from dtcache.teacher.taps import TappedUNet, choose_taps, find_taps


class Teacher:
    """A truncated teacher on a device, with everything that its features depend on resolved in `spec`."""

    def __init__(self, loaded: LoadedTeacher, taps: tuple[TapSpec, ...], spec: TeacherSpec, compute: Compute) -> None:
        self.spec = spec
        self._compute = compute
        self._alpha_bars = loaded.alpha_bars.to(compute.device)
        network = TappedUNet(loaded.unet, tuple(tap.block for tap in taps))
        self._network = network.to(compute.device).to(memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def features(self, pixels_BCHW: Tensor, noise_BCHW: Tensor, timestep: int) -> dict[str, Tensor]:
        """Return the taps' raw features by name, fp32 (B, C, H, W), of noised views.

        `pixels_BCHW` uint8; `noise_BCHW` fp32 of the same shape. x_t = sqrt(a) x + sqrt(1 - a) noise, in fp32
        (Ho et al. 2020, eq. 4). A short batch is padded to the recipe's batch size, because the batch shape moves
        results in their last bits.
        """
        count, full = len(pixels_BCHW), self.spec.batch_size
        device = self._compute.device
        clean_BCHW = pixels_BCHW.to(device).float() / 127.5 - 1.0
        alpha_bar = self._alpha_bars[timestep]
        noisy_BCHW = alpha_bar.sqrt() * clean_BCHW + (1.0 - alpha_bar).sqrt() * noise_BCHW.to(device)
        if count < full:
            noisy_BCHW = torch.cat([noisy_BCHW, noisy_BCHW.new_zeros(full - count, *noisy_BCHW.shape[1:])])
        t_B = torch.full((full,), timestep, device=device, dtype=torch.long)
        with self._compute.autocast():
            found = self._network(noisy_BCHW.contiguous(memory_format=torch.channels_last), t_B)
        return {tap.name: found[tap.block][:count].float() for tap in self.spec.taps}


def prepare_teacher(
    loaded: LoadedTeacher,
    view: ViewSpec,
    *,
    strides: tuple[int, ...] | None,
    timesteps: tuple[int, ...],
    batch_size: int,
    compute: Compute,
) -> Teacher:
    """Find and choose taps, truncate the network and resolve the recipe's constants.

    Raises ConfigError for a size, stride or timestep that the teacher cannot serve.
    """
    steps = len(loaded.alpha_bars)
    for timestep in timesteps:
        if not 0 <= timestep < steps:
            raise ConfigError(f"--timestep {timestep}: this teacher was trained with steps 0 to {steps - 1}")
    if len(set(timesteps)) != len(timesteps) or not timesteps:
        raise ConfigError(f"--timestep: expected one or several different steps, got {list(timesteps)}")
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: expected at least 1")
    taps = choose_taps(find_taps(loaded.unet, view.height, view.width), strides)
    spec = TeacherSpec(
        architecture=loaded.architecture,
        weights_sha256=loaded.weights_sha256,
        config_sha256=loaded.config_sha256,
        timesteps=timesteps,
        alpha_bars=tuple(float(loaded.alpha_bars[t]) for t in timesteps),
        taps=taps,
        precision=compute.precision,
        batch_size=batch_size,
        device_type=compute.device.type,
    )
    return Teacher(loaded, taps, spec, compute)


def native_size(loaded: LoadedTeacher) -> tuple[int, int]:
    """Return the (height, width) that the teacher was trained at, pixels. Raises ConfigError where it names none."""
    size = loaded.unet.config.sample_size
    if size is None:
        raise ConfigError("this teacher's configuration names no sample_size: give --size")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def noise_batch(keys: list[str], flips: list[bool], view: ViewSpec, *, seed: int, timestep: int, draw: int) -> Tensor:
    """Return fp32 noise (B, 3, H, W) of samples and their flips, each drawn from its own key."""
    shape = (3, view.height, view.width)
    maps = [
        sample_noise(shape, seed=seed, key=key, timestep=timestep, draw=draw, flip=flip)
        for key, flip in zip(keys, flips, strict=True)
    ]
    return torch.from_numpy(np.stack(maps))
