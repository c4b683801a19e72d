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
from dtcache.teacher.condition import choose_condition, require_labels
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
    labels_B: Tensor | None = None
    """int64: the class that the network is told of each view, where it is class-conditional."""


class Teacher:
    """A truncated teacher on a device, with everything that its features depend on resolved in `spec`."""

    def __init__(
        self, loaded: LoadedTeacher, taps: tuple[TapSpec, ...], spec: TeacherSpec, view: ViewSpec, compute: Compute
    ) -> None:
        self.spec = spec
        self.view = view
        self.prompt = loaded.prompt
        self._num_classes = loaded.denoiser.num_classes
        self._compute = compute
        stride = loaded.latents.stride if loaded.latents is not None else 1
        self._noise_shape = (loaded.denoiser.channels, view.height // stride, view.width // stride)
        self._null_class = loaded.denoiser.null_class
        self._alpha_bars = loaded.alpha_bars.to(compute.device)
        self._latents = None
        if loaded.latents is not None:
            self._latents = loaded.latents.to(compute.device).to(memory_format=torch.channels_last)
        self._network = loaded.denoiser.tapped(taps).to(compute.device).to(memory_format=torch.channels_last).eval()

    def batch(
        self,
        pixels: Sequence[NDArray[np.uint8]],
        keys: Sequence[str],
        flips: Sequence[bool],
        *,
        seed: int,
        draws: Sequence[int],
        labels: Sequence[int | None] | None = None,
    ) -> TeacherBatch:
        """Return B views, each mirrored where its flip says so, with the noise of every draw and timestep.

        `pixels` are uint8 (3, H, W), not mirrored. Noise belongs to (seed, key, timestep, draw, flip): see `noise`.
        `labels` are read only where the teacher is told each sample's own.
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
            labels_B=self._labels(len(views), labels),
        )

    def require_labels(self, keys: Sequence[str], labels: Sequence[int | None] | None) -> None:
        """Raise ImagesError where each sample's label is told and one of them is none of the teacher's classes."""
        if self.spec.condition is not None and self.spec.condition.kind == "label":
            assert self._num_classes is not None, "only a class-conditional teacher is told labels"
            require_labels(keys, labels, self._num_classes)

    def _labels(self, count: int, labels: Sequence[int | None] | None) -> Tensor | None:
        """Return the classes that the network is told, as the recipe's condition says."""
        condition = self.spec.condition
        if condition is None or condition.kind == "prompt":
            return None
        if condition.kind == "label":
            assert labels is not None, "a job whose condition is the label has labels for all of its samples"
            return self._pinned(torch.tensor(labels, dtype=torch.long))
        told = condition.number if condition.kind == "class" else self._null_class
        return self._pinned(torch.tensor([told] * count, dtype=torch.long))

    @torch.inference_mode()
    def features(self, batch: TeacherBatch) -> Iterator[dict[str, Tensor]]:
        """Yield, draw by draw, the raw features of all timesteps and taps by array name: fp32 (B, C, H, W).

        x_t = sqrt(a) x + sqrt(1 - a) noise, in fp32 (Ho et al. 2020, eq. 4). A short batch is padded to the recipe's
        batch size, because the batch shape moves results in their last bits.
        """
        device = self._compute.device
        clean_BCHW = self._input(batch.pixels_BCHW.to(device, non_blocking=True).float() / 127.5 - 1.0)
        labels_B = None if batch.labels_B is None else batch.labels_B.to(device, non_blocking=True)
        for by_timestep in batch.noise:
            found = {}
            for timestep, noise_BCHW in by_timestep.items():
                alpha_bar = self._alpha_bars[timestep]
                noise_BCHW = noise_BCHW.to(device, non_blocking=True)
                noisy_BCHW = alpha_bar.sqrt() * clean_BCHW + (1.0 - alpha_bar).sqrt() * noise_BCHW
                for tap, raw_BCHW in self._tapped(noisy_BCHW, timestep, labels_B).items():
                    found[tap_name(timestep, tap)] = raw_BCHW
            yield found

    def _input(self, pixels_BCHW: Tensor) -> Tensor:
        """Return what the network sees of pixels in [-1, 1] before they are noised: themselves, or their latents.

        Latents are made once for all timesteps and draws, in the network's own precision: what bfloat16 takes from
        them lies far under the noise that they are about to be given, and fp32 would cost more than the network.
        """
        if self._latents is None:
            return pixels_BCHW
        with self._compute.autocast():
            latents_BCHW: Tensor = self._latents(self._padded(pixels_BCHW))
        return latents_BCHW[: len(pixels_BCHW)].float()

    def _tapped(self, noisy_BCHW: Tensor, timestep: int, labels_B: Tensor | None) -> dict[str, Tensor]:
        count, full_BCHW = len(noisy_BCHW), self._padded(noisy_BCHW)
        t_B = torch.full((len(full_BCHW),), timestep, device=noisy_BCHW.device, dtype=torch.long)
        with self._compute.autocast():
            found = self._network(full_BCHW, t_B, None if labels_B is None else self._padded(labels_B))
        return {tap.name: found[tap.name][:count].float() for tap in self.spec.taps}

    def _padded(self, x: Tensor) -> Tensor:
        """Return a short batch with zeros up to the recipe's batch size; images in the networks' memory format."""
        missing = self.spec.batch_size - len(x)
        if missing > 0:
            x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    def _pinned(self, host: Tensor) -> Tensor:
        """Return a tensor that a CUDA device can fetch while it computes."""
        return host.pin_memory() if self._compute.device.type == "cuda" else host


def prepare_teacher(
    loaded: LoadedTeacher,
    view: ViewSpec,
    *,
    taps: tuple[str, ...] | None,
    timesteps: tuple[int, ...],
    batch_size: int,
    compute: Compute,
    condition: str | None = None,
) -> Teacher:
    """Find and choose taps, truncate the network and resolve the recipe's constants.

    `condition` is label, null, a class number, or None for the default: see `choose_condition`. Raises ConfigError
    for a size, tap, timestep or condition that the teacher cannot serve.
    """
    steps = len(loaded.alpha_bars)
    for timestep in timesteps:
        if not 0 <= timestep < steps:
            raise ConfigError(f"--timestep {timestep}: this teacher was trained with steps 0 to {steps - 1}")
    if len(set(timesteps)) != len(timesteps) or not timesteps:
        raise ConfigError(f"--timestep: expected one or several different steps, got {list(timesteps)}")
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: expected at least 1")
    told = choose_condition(loaded.denoiser, loaded.prompt, condition)
    stride = loaded.latents.stride if loaded.latents is not None else 1
    chosen = choose_taps(loaded.denoiser.find_taps(view.height, view.width, stride), taps)
    spec = TeacherSpec(
        architecture=loaded.architecture,
        weights_sha256=loaded.weights_sha256,
        config_sha256=loaded.config_sha256,
        timesteps=timesteps,
        alpha_bars=tuple(float(loaded.alpha_bars[t]) for t in timesteps),
        taps=chosen,
        precision=compute.precision,
        batch_size=batch_size,
        device_type=compute.device.type,
        condition=told,
    )
    return Teacher(loaded, chosen, spec, view, compute)


def native_size(loaded: LoadedTeacher) -> tuple[int, int]:
    """Return the (height, width) that the teacher was trained at, pixels. Raises ConfigError where it names none."""
    size = loaded.denoiser.native_size
    if size is None:
        raise ConfigError("this teacher's configuration names no sample_size: give --size")
    stride = loaded.latents.stride if loaded.latents is not None else 1
    return size[0] * stride, size[1] * stride
