"""One denoising pass: uint8 views in, decoder features out (paper: feature dataset, stochastic encoding)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
class TeacherInput:
    """What the passes over one view need; threads can make it ahead of them."""

    pixels_CHW: NDArray[np.uint8]
    """RGB, mirrored where the view is."""
    noise: tuple[dict[int, NDArray[np.float32]], ...]
    """A draw: by timestep, of the network's input shape (C, H, W)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherBatch:
    """The inputs of B views side by side, on the host."""

    pixels_BCHW: Tensor
    """uint8 RGB, mirrored where the view is."""
    noise: tuple[dict[int, Tensor], ...]
    """A draw: by timestep, fp32 (B, C, H, W)."""


class Teacher:
    """A truncated teacher on a device, with everything that its features depend on resolved in `spec`."""

    def __init__(
        self, loaded: LoadedTeacher, taps: tuple[TapSpec, ...], spec: TeacherSpec, view: ViewSpec, compute: Compute
    ) -> None:
        self.spec = spec
        self.device = compute.device
        self._compute = compute
        self._noise_shape = (loaded.denoiser.channels, view.height, view.width)
        self._alpha_bars = loaded.alpha_bars.to(compute.device)
        self._network = loaded.denoiser.tapped(taps).to(compute.device).to(memory_format=torch.channels_last).eval()

    def input(
        self, pixels_CHW: NDArray[np.uint8], key: str, flip: bool, *, seed: int, draws: Sequence[int]
    ) -> TeacherInput:
        """Return one view, mirrored where `flip` says so, with the noise of every draw and timestep.

        `pixels_CHW` are uint8 RGB, not mirrored. Noise belongs to (seed, key, timestep, draw, flip): see `noise`.
        """

        def noise(timestep: int, draw: int) -> NDArray[np.float32]:
            return sample_noise(self._noise_shape, seed=seed, key=key, timestep=timestep, draw=draw, flip=flip)

        return TeacherInput(
            pixels_CHW=np.ascontiguousarray(pixels_CHW[:, :, ::-1]) if flip else pixels_CHW,
            noise=tuple({t: noise(t, draw) for t in self.spec.timesteps} for draw in draws),
        )

    def batch(self, inputs: Sequence[TeacherInput]) -> TeacherBatch:
        """Return views of the same draws as one batch."""

        def stacked(maps: Iterable[NDArray[Any]]) -> Tensor:
            host = torch.from_numpy(np.stack(list(maps)))
            return host.pin_memory() if self._compute.device.type == "cuda" else host  # fetched beside computing

        return TeacherBatch(
            pixels_BCHW=stacked(view.pixels_CHW for view in inputs),
            noise=tuple(
                {t: stacked(view.noise[draw][t] for view in inputs) for t in self.spec.timesteps}
                for draw in range(len(inputs[0].noise))
            ),
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
