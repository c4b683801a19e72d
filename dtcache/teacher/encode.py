"""One denoising pass: uint8 views in, decoder features out (paper: feature dataset, stochastic encoding)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.device import Compute
from dtcache.errors import ConfigError
from dtcache.spec import TapSpec, TeacherSpec, ViewSpec, tap_name
from dtcache.teacher.denoiser import choose_taps
from dtcache.teacher.load import LoadedTeacher
from dtcache.teacher.noise import sample_noise


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherBatch:
    """What the passes over B views need, on the host: it can be made ahead of them, in threads."""

    pixels_BCHW: Tensor
    """uint8 RGB, mirrored where the view is."""
    noise: tuple[dict[int, Tensor], ...]
    """A draw: by timestep, fp32 of the network's input shape (B, C, H, W)."""


class Teacher:
    """A truncated teacher on a device, with everything that its features depend on resolved in `spec`."""

    def __init__(
        self, loaded: LoadedTeacher, taps: tuple[TapSpec, ...], spec: TeacherSpec, view: ViewSpec, compute: Compute
    ) -> None:
        self.spec = spec
        self._compute = compute
        self._noise_shape = (loaded.denoiser.channels, view.height, view.width)
        self._alpha_bars = loaded.alpha_bars.to(compute.device)
        self._network = loaded.denoiser.tapped(taps).to(compute.device).to(memory_format=torch.channels_last).eval()

    def batch(
        self,
        pixels: Sequence[NDArray[np.uint8]],
        keys: Sequence[str],
        flips: Sequence[bool],
        *,
        seed: int,
        draws: Sequence[int],
    ) -> TeacherBatch:
        """Return B views, each mirrored where its flip says so, with the noise of every draw and timestep.

        `pixels` are uint8 (3, H, W), not mirrored. Noise belongs to (seed, key, timestep, draw, flip): see `noise`.
        """
        views = [np.ascontiguousarray(p[:, :, ::-1]) if flip else p for p, flip in zip(pixels, flips, strict=True)]

        def noise(timestep: int, draw: int) -> Tensor:
            maps = [
                sample_noise(self._noise_shape, seed=seed, key=key, timestep=timestep, draw=draw, flip=flip)
                for key, flip in zip(keys, flips, strict=True)
            ]
            return self._pinned(torch.from_numpy(np.stack(maps)))

        return TeacherBatch(
            pixels_BCHW=self._pinned(torch.from_numpy(np.stack(views))),
            noise=tuple({t: noise(t, draw) for t in self.spec.timesteps} for draw in draws),
        )

    @torch.inference_mode()
    def features(self, batch: TeacherBatch) -> Iterator[dict[str, Tensor]]:
        """Yield, draw by draw, the raw features of all timesteps and taps by array name: fp32 (B, C, H, W).

        x_t = sqrt(a) x + sqrt(1 - a) noise, in fp32 (Ho et al. 2020, eq. 4). A short batch is padded to the recipe's
        batch size, because the batch shape moves results in their last bits.
        """
        device = self._compute.device
        clean_BCHW = batch.pixels_BCHW.to(device, non_blocking=True).float() / 127.5 - 1.0
        for by_timestep in batch.noise:
            found = {}
            for timestep, noise_BCHW in by_timestep.items():
                alpha_bar = self._alpha_bars[timestep]
                noise_BCHW = noise_BCHW.to(device, non_blocking=True)
                noisy_BCHW = alpha_bar.sqrt() * clean_BCHW + (1.0 - alpha_bar).sqrt() * noise_BCHW
                for tap, raw_BCHW in self._tapped(noisy_BCHW, timestep).items():
                    found[tap_name(timestep, tap)] = raw_BCHW
            yield found

    def _tapped(self, noisy_BCHW: Tensor, timestep: int) -> dict[str, Tensor]:
        count, full = len(noisy_BCHW), self.spec.batch_size
        if count < full:
            noisy_BCHW = torch.cat([noisy_BCHW, noisy_BCHW.new_zeros(full - count, *noisy_BCHW.shape[1:])])
        t_B = torch.full((full,), timestep, device=noisy_BCHW.device, dtype=torch.long)
        with self._compute.autocast():
            found = self._network(noisy_BCHW.contiguous(memory_format=torch.channels_last), t_B)
        return {tap.name: found[tap.name][:count].float() for tap in self.spec.taps}

    def _pinned(self, host: Tensor) -> Tensor:
        """Return a tensor that a CUDA device can fetch while it computes."""
        return host.pin_memory() if self._compute.device.type == "cuda" else host


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
    taps = choose_taps(loaded.denoiser.find_taps(view.height, view.width), strides)
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
    return Teacher(loaded, taps, spec, view, compute)


def native_size(loaded: LoadedTeacher) -> tuple[int, int]:
    """Return the (height, width) that the teacher was trained at, pixels. Raises ConfigError where it names none."""
    size = loaded.denoiser.native_size
    if size is None:
        raise ConfigError("this teacher's configuration names no sample_size: give --size")
    return size
