"""One denoising pass: uint8 views in, decoder features out (paper: feature dataset, encoded)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.device import Compute, DeviceClock, compiled, memory_errors
from dtcache.errors import ConfigError
from dtcache.recipe import Box, TeacherSpec, ViewSpec, signal_to_noise, tap_name
from dtcache.rng import sample_noise
from dtcache.teacher.aligned_crop import find_crop
from dtcache.teacher.condition import choose_condition, require_labels
from dtcache.teacher.ddim_inversion import Inversion, ddim_levels
from dtcache.teacher.denoiser import choose_taps
from dtcache.teacher.load import LoadedTeacher
from dtcache.teacher.noising import Encoding, Noising

SMALLER_BATCH = "give a smaller --batch-size, or auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherInput:
    """What the passes over one view need; threads can make it ahead of them."""

    pixels_CHW: NDArray[np.uint8]
    """RGB, mirrored where the view is."""
    label: int | None
    """The class that the network is told of it, None where it is told none."""
    noise: tuple[dict[int, NDArray[np.float32]], ...]
    """A draw: by timestep, of the network's input shape (C, H, W); empty where the encoding takes none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherBatch:
    """The inputs of B views side by side, on the host."""

    pixels_BCHW: Tensor
    """uint8 RGB, mirrored where the view is."""
    labels_B: Tensor | None
    """int64, None where the network is told no class."""
    noise: tuple[dict[int, Tensor], ...]
    """A draw: by timestep, fp32 (B, C, H, W); empty where the encoding takes none."""

    def changed(self, change: Callable[[Tensor], Tensor]) -> "TeacherBatch":
        """Return the batch with the same change made to pixels and noise, maps of (B, C, H, W)."""
        noise = tuple(
            {t: change(noise_BCHW) for t, noise_BCHW in draw.items()} for draw in self.noise
        )
        return replace(self, pixels_BCHW=change(self.pixels_BCHW), noise=noise)


class Teacher:
    """A truncated teacher on a device, with everything that its features depend on resolved in `spec`."""

    def __init__(
        self,
        loaded: LoadedTeacher,
        encoding: Encoding,
        spec: TeacherSpec,
        view: ViewSpec,
        crop: Box | None,
        compute: Compute,
    ) -> None:
        """Take a loaded teacher to the device, cut off after the taps of `spec`."""
        self.spec = spec
        self.view = view
        self.encoding = encoding
        self.crop = crop
        """The crop of the view at which equivariance can be measured."""
        self.denoiser = loaded.denoiser
        """The whole of it; it shares its weights with `network`."""
        self.input_shape = (
            loaded.denoiser.channels,
            view.height // loaded.latent_stride,
            view.width // loaded.latent_stride,
        )
        """(C, H, W) of what is noised."""
        self.prompt = loaded.prompt
        self.device = compute.device
        self._compute = compute
        self._num_classes = loaded.denoiser.num_classes
        self._null_class = loaded.denoiser.null_class
        self._noise_shape = encoding.noise_shape(view.height, view.width)
        self._latents = _placed(loaded.latents, compute) if loaded.latents is not None else None
        self.network = _placed(loaded.denoiser.tapped(spec.taps), compute)
        """Ends after the last tap; in evaluation mode, channels last."""
        self._run = compiled(self.network) if spec.compiled else self.network
        self.clock = DeviceClock(compute.device)
        """Of all passes, the autoencoder's and an inversion's among them."""

    @property
    def is_random(self) -> bool:
        """Whether noise is drawn, so that one image has features of many draws."""
        return self._noise_shape is not None

    def input(
        self,
        pixels_CHW: NDArray[np.uint8],
        key: str,
        flip: bool,
        *,
        seed: int,
        draws: Sequence[int],
        label: int | None = None,
    ) -> TeacherInput:
        """Return one view, mirrored where `flip` says so, with the noise of every draw and timestep.

        `pixels_CHW` are uint8 RGB, not mirrored. Noise belongs to (seed, key, timestep, draw, flip): see `noise`.
        `label` is the sample's own class; it is read only where the network is told that.
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
        return TeacherInput(
            pixels_CHW=mirrored_CHW, label=self._told(label), noise=tuple(map(noise, draws))
        )

    def batch(self, inputs: Sequence[TeacherInput]) -> TeacherBatch:
        """Return views of the same draws as one batch."""

        def stacked(maps: Iterable[Any]) -> Tensor:
            host = torch.from_numpy(np.stack(list(maps)))
            return (
                host.pin_memory() if self.device.type == "cuda" else host
            )  # so that the upload need not wait

        told = [np.int64(view.label) for view in inputs if view.label is not None]
        return TeacherBatch(
            pixels_BCHW=stacked(view.pixels_CHW for view in inputs),
            labels_B=stacked(told) if told else None,
            noise=tuple(
                {t: stacked(view.noise[draw][t] for view in inputs) for t in by_timestep}
                for draw, by_timestep in enumerate(inputs[0].noise)
            ),
        )

    def require_labels(self, keys: Iterable[str], labels: Iterable[int | None] | None) -> None:
        """Raise ImagesError where each sample's label is told and one of them is none of the teacher's classes."""
        if self.spec.condition is not None and self.spec.condition.kind == "label":
            assert self._num_classes is not None, "only a class-conditional teacher is told labels"
            require_labels(keys, labels, self._num_classes)

    @torch.inference_mode()
    def features(self, batch: TeacherBatch) -> Iterator[dict[str, Tensor]]:
        """Yield, draw by draw, the raw features of all timesteps and taps by array name: fp32 (B, C, H, W).

        Latents are made once for all draws and timesteps. A short batch is padded to the recipe's batch size, because
        the batch shape moves results in their last bits.
        """
        # Other shapes, as equivariance is measured on, would be compiled anew.
        view = (
            max(self.spec.batch_size, len(batch.pixels_BCHW)),
            3,
            self.view.height,
            self.view.width,
        )
        run = (
            self._run
            if view[0] == self.spec.batch_size and batch.pixels_BCHW.shape[1:] == view[1:]
            else self.network
        )
        with self.clock.running(), memory_errors(self.spec.batch_size, SMALLER_BATCH):
            count = len(batch.pixels_BCHW)
            clean_BCHW = self.clean(batch)
            labels_B = self.labels(batch)
        for by_timestep in batch.noise:
            found = {}
            for timestep in self.spec.timesteps:
                noise_BCHW = self._padded(by_timestep[timestep]) if self.is_random else None
                with self.clock.running(), memory_errors(self.spec.batch_size, SMALLER_BATCH):
                    arguments = self.encoding.inputs(clean_BCHW, noise_BCHW, timestep, labels_B)
                    with self._compute.autocast():
                        maps = run(*map(_channels_last, arguments))
                for tap in self.spec.taps:
                    found[tap_name(timestep, tap.name)] = maps[tap.name][:count].float()
            yield found

    def clean(self, batch: TeacherBatch) -> Tensor:
        """Return what is to be noised, fp32 on the device, padded to the recipe's batch size: pixels in [-1, 1], or
        their latents.

        Latents are made in the network's own precision: what bfloat16 takes from them lies far under the noise that
        they are about to be given, and fp32 would cost more than the network.
        """
        pixels_BCHW = self._padded(batch.pixels_BCHW).float() / 127.5 - 1.0
        if self._latents is None:
            return pixels_BCHW
        with self._compute.autocast():
            latents_BCHW: Tensor = self._latents(_channels_last(pixels_BCHW))
        return latents_BCHW.float()

    def labels(self, batch: TeacherBatch) -> Tensor | None:
        """Return the classes that the network is told, int64 on the device, padded likewise."""
        return self._padded(batch.labels_B) if batch.labels_B is not None else None

    def _told(self, label: int | None) -> int | None:
        """Return the class that the network is told of a sample, as the recipe's condition says."""
        condition = self.spec.condition
        if condition is None or condition.kind == "prompt":
            return None
        own = {"label": label, "class": condition.number, "null": self._null_class}
        told = own[condition.kind]
        assert told is not None, (
            "a job whose condition is the label has labels for all of its samples"
        )
        return told

    def _padded(self, host: Tensor) -> Tensor:
        """Bring a batch to the device and to the recipe's batch size, with zeros."""
        there = host.to(self.device, non_blocking=True)
        lacking = self.spec.batch_size - len(there)
        return (
            torch.cat([there, there.new_zeros(lacking, *there.shape[1:])]) if lacking > 0 else there
        )


def _channels_last(x: Any) -> Any:
    is_map = isinstance(x, Tensor) and x.dim() == 4
    return x.contiguous(memory_format=torch.channels_last) if is_map else x


def _placed(network: nn.Module, compute: Compute) -> nn.Module:
    return network.to(compute.device).to(memory_format=torch.channels_last).eval()


def prepare_teacher(
    loaded: LoadedTeacher,
    view: ViewSpec,
    *,
    taps: tuple[str, ...] | None,
    timesteps: tuple[int, ...],
    batch_size: int,
    compute: Compute,
    condition: str | None = None,
    ddim_steps: int | None = None,
    compile: bool = False,
) -> Teacher:
    """Find and choose taps, truncate the network and resolve the recipe's constants.

    `condition` is label, null, a class number, or None for the default: see `choose_condition`. With `ddim_steps`
    images are inverted by so many steps, else noised. With `compile` torch.compile compiles the network. Raises
    ConfigError for a size, tap, timestep, condition or encoding that the teacher cannot serve.
    """
    steps = len(loaded.alpha_bars)
    for timestep in timesteps:
        if not 0 <= timestep < steps:
            raise ConfigError(
                f"--timestep {timestep}: this teacher was trained with steps 0 to {steps - 1}"
            )
        if ddim_steps is not None:
            ddim_levels(timestep, ddim_steps)
    if len(set(timesteps)) != len(timesteps) or not timesteps:
        raise ConfigError(
            f"--timestep: expected one or several different steps, got {list(timesteps)}"
        )
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: expected at least 1")
    told = choose_condition(loaded.denoiser, loaded.prompt, condition)
    offered = loaded.denoiser.find_taps(view.height, view.width, loaded.latent_stride)
    alpha_bars = tuple(float(loaded.alpha_bars[t]) for t in timesteps)
    spec = TeacherSpec(
        architecture=loaded.architecture,
        weights_sha256=loaded.weights_sha256,
        config_sha256=loaded.config_sha256,
        timesteps=timesteps,
        alpha_bars=alpha_bars,
        taps=choose_taps(offered, taps),
        precision=compute.precision,
        batch_size=batch_size,
        device_type=compute.device.type,
        snrs=tuple(map(signal_to_noise, alpha_bars)),
        ddim_steps=ddim_steps,
        condition=told,
        compiled=compile or None,
    )
    encoding = _encoding(loaded, compute, ddim_steps)
    crop = find_crop(loaded.denoiser, offered, view, loaded.latent_stride)
    return Teacher(loaded, encoding, spec, view, crop, compute)


def _encoding(loaded: LoadedTeacher, compute: Compute, ddim_steps: int | None) -> Encoding:
    """Return the teacher's own encoding, or the one asked for."""
    if ddim_steps is None:
        noising = Noising(
            loaded.alpha_bars.to(compute.device), loaded.denoiser.channels, loaded.latent_stride
        )
        return loaded.encoding or noising
    whole = _placed(loaded.denoiser.predictor(), compute)

    def predictor(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        with compute.autocast():
            output_BCHW: Tensor = whole(_channels_last(x_BCHW), t_B, labels_B)
        return output_BCHW.float()

    return Inversion(predictor, loaded.alpha_bars, loaded.prediction, ddim_steps)


def native_size(loaded: LoadedTeacher) -> tuple[int, int]:
    """Return the (height, width) that the teacher was trained at, pixels. Raises ConfigError where it names none."""
    size = loaded.denoiser.native_size
    if size is None:
        raise ConfigError("this teacher's configuration names no sample_size: give --size")
    return size[0] * loaded.latent_stride, size[1] * loaded.latent_stride
