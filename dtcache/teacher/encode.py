"""One denoising pass: uint8 views in, decoder features out (paper: feature dataset, encoded)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.device import Compute
from dtcache.errors import ConfigError
from dtcache.spec import Box, TeacherSpec, ViewSpec, signal_to_noise, tap_name
from dtcache.teacher.crop import find_crop
from dtcache.teacher.denoiser import choose_taps
from dtcache.teacher.encoding import Encoding, Noising
from dtcache.teacher.invert import Inversion, ddim_levels
from dtcache.teacher.load import LoadedTeacher
from dtcache.teacher.noise import sample_noise


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherInput:
    """What the passes over one view need; threads can make it ahead of them."""

    pixels_CHW: NDArray[np.uint8]
    """RGB, mirrored where the view is."""
    noise: tuple[dict[int, NDArray[np.float32]], ...]
    """A draw: by timestep, of the network's input shape (C, H, W); empty where the encoding takes none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherBatch:
    """The inputs of B views side by side, on the host."""

    pixels_BCHW: Tensor
    """uint8 RGB, mirrored where the view is."""
    noise: tuple[dict[int, Tensor], ...]
    """A draw: by timestep, fp32 (B, C, H, W); empty where the encoding takes none."""

    def changed(self, change: Callable[[Tensor], Tensor]) -> "TeacherBatch":
        """Return the batch with the same change made to pixels and noise, maps of (B, C, H, W)."""
        noise = tuple({t: change(noise_BCHW) for t, noise_BCHW in draw.items()} for draw in self.noise)
        return replace(self, pixels_BCHW=change(self.pixels_BCHW), noise=noise)


class Teacher:
    """A truncated teacher on a device, with everything that its features depend on resolved in `spec`."""

    def __init__(
        self, network: nn.Module, encoding: Encoding, spec: TeacherSpec, view: ViewSpec, crop: Box | None,
        compute: Compute,
    ) -> None:  # fmt: skip
        """Take a tapped network, on the device, and an encoding that makes its arguments."""
        self.spec = spec
        self.device = compute.device
        self.crop = crop
        """The crop of the view at which equivariance can be measured."""
        self.encoding = encoding
        self._compute = compute
        self._noise_shape = encoding.noise_shape(view.height, view.width)
        self._network = network

    @property
    def is_random(self) -> bool:
        """Whether noise is drawn, so that one image has features of many draws."""
        return self._noise_shape is not None

    def input(
        self, pixels_CHW: NDArray[np.uint8], key: str, flip: bool, *, seed: int, draws: Sequence[int]
    ) -> TeacherInput:
        """Return one view, mirrored where `flip` says so, with the noise of every draw and timestep.

        `pixels_CHW` are uint8 RGB, not mirrored. Noise belongs to (seed, key, timestep, draw, flip): see `noise`.
        """
        shape = self._noise_shape

        def noise(draw: int) -> dict[int, NDArray[np.float32]]:
            if shape is None:
                return {}
            return {
                t: sample_noise(shape, seed=seed, key=key, timestep=t, draw=draw, flip=flip)
                for t in self.spec.timesteps
            }

        mirrored_CHW = np.ascontiguousarray(pixels_CHW[:, :, ::-1]) if flip else pixels_CHW
        return TeacherInput(pixels_CHW=mirrored_CHW, noise=tuple(map(noise, draws)))

    def batch(self, inputs: Sequence[TeacherInput]) -> TeacherBatch:
        """Return views of the same draws as one batch."""

        def stacked(maps: Iterable[NDArray[Any]]) -> Tensor:
            host = torch.from_numpy(np.stack(list(maps)))
            return host.pin_memory() if self.device.type == "cuda" else host  # fetched beside computing

        return TeacherBatch(
            pixels_BCHW=stacked(view.pixels_CHW for view in inputs),
            noise=tuple(
                {t: stacked(view.noise[draw][t] for view in inputs) for t in by_timestep}
                for draw, by_timestep in enumerate(inputs[0].noise)
            ),
        )

    @torch.inference_mode()
    def features(self, batch: TeacherBatch) -> Iterator[dict[str, Tensor]]:
        """Yield, draw by draw, the raw features of all timesteps and taps by array name: fp32 (B, C, H, W).

        A short batch is padded to the recipe's batch size, because the batch shape moves results in their last bits.
        """
        count, clean_BCHW = len(batch.pixels_BCHW), self.clean(batch)
        for by_timestep in batch.noise:
            found = {}
            for timestep in self.spec.timesteps:
                noise_BCHW = self._padded(by_timestep[timestep]) if self.is_random else None
                arguments = self.encoding.inputs(clean_BCHW, noise_BCHW, timestep)
                with self._compute.autocast():
                    maps = self._network(*map(_channels_last, arguments))
                for tap in self.spec.taps:
                    found[tap_name(timestep, tap.name)] = maps[tap.name][:count].float()
            yield found

    def clean(self, batch: TeacherBatch) -> Tensor:
        """Return the images in [-1, 1], fp32 on the device, padded to the recipe's batch size."""
        return self._padded(batch.pixels_BCHW).float() / 127.5 - 1.0

    def _padded(self, host_BCHW: Tensor) -> Tensor:
        """Bring a batch to the device and to the recipe's batch size, with zeros."""
        there_BCHW = host_BCHW.to(self._compute.device, non_blocking=True)
        lacking = self.spec.batch_size - len(there_BCHW)
        if lacking <= 0:
            return there_BCHW
        return torch.cat([there_BCHW, there_BCHW.new_zeros(lacking, *there_BCHW.shape[1:])])


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def prepare_teacher(
    loaded: LoadedTeacher,
    view: ViewSpec,
    *,
    strides: tuple[int, ...] | None,
    timesteps: tuple[int, ...],
    batch_size: int,
    compute: Compute,
    ddim_steps: int | None = None,
) -> Teacher:
    """Find and choose taps, truncate the network and resolve the recipe's constants.

    With `ddim_steps` images are inverted by so many steps, else noised. Raises ConfigError for a size, stride,
    timestep or encoding that the teacher cannot serve.
    """
    steps = len(loaded.alpha_bars)
    for timestep in timesteps:
        if not 0 <= timestep < steps:
            raise ConfigError(f"--timestep {timestep}: this teacher was trained with steps 0 to {steps - 1}")
        if ddim_steps is not None:
            ddim_levels(timestep, ddim_steps)
    if len(set(timesteps)) != len(timesteps) or not timesteps:
        raise ConfigError(f"--timestep: expected one or several different steps, got {list(timesteps)}")
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: expected at least 1")
    offered = loaded.denoiser.find_taps(view.height, view.width)
    taps = choose_taps(offered, strides)
    alpha_bars = tuple(float(loaded.alpha_bars[t]) for t in timesteps)
    spec = TeacherSpec(
        architecture=loaded.architecture,
        weights_sha256=loaded.weights_sha256,
        config_sha256=loaded.config_sha256,
        timesteps=timesteps,
        alpha_bars=alpha_bars,
        taps=taps,
        precision=compute.precision,
        batch_size=batch_size,
        device_type=compute.device.type,
        snrs=tuple(map(signal_to_noise, alpha_bars)),
        ddim_steps=ddim_steps,
    )
    encoding = _encoding(loaded, compute, ddim_steps)
    crop = find_crop(loaded.denoiser, offered, view)
    return Teacher(_placed(loaded.denoiser.tapped(taps), compute), encoding, spec, view, crop, compute)


def _encoding(loaded: LoadedTeacher, compute: Compute, ddim_steps: int | None) -> Encoding:
    """Return the teacher's own encoding, or the one asked for."""
    if ddim_steps is None:
        return loaded.encoding or Noising(loaded.alpha_bars.to(compute.device), loaded.denoiser.channels)
    whole = _placed(loaded.denoiser.predictor(), compute)

    def predictor(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        with compute.autocast():
            output_BCHW: Tensor = whole(_channels_last(x_BCHW), t_B)
        return output_BCHW.float()

    return Inversion(predictor, loaded.alpha_bars, loaded.prediction, ddim_steps)


def _placed(network: nn.Module, compute: Compute) -> nn.Module:
    return network.to(compute.device).to(memory_format=torch.channels_last).eval()


def native_size(loaded: LoadedTeacher) -> tuple[int, int]:
    """Return the (height, width) that the teacher was trained at, pixels. Raises ConfigError where it names none."""
    size = loaded.denoiser.native_size
    if size is None:
        raise ConfigError("this teacher's configuration names no sample_size: give --size")
    return size
