"""The teacher: from uint8 views to decoder features, one pass per timestep and draw."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.compilation import compiled
from dtcache.device import Compute
from dtcache.device_clock import DeviceClock
from dtcache.device_memory import memory_errors
from dtcache.errors import ConfigError, TeacherError
from dtcache.recipe import Box, TeacherSpec, ViewSpec, signal_to_noise, tap_name
from dtcache.rng import sample_noise
from dtcache.teacher.aligned_crop import find_crop
from dtcache.teacher.condition import choose_condition, require_labels
from dtcache.teacher.ddim_inversion import Inversion, ddim_levels
from dtcache.teacher.denoiser import choose_taps
from dtcache.teacher.loaded_teacher import LoadedTeacher
from dtcache.teacher.noising import Encoding, Noising

SMALLER_BATCH = "pass a smaller `batch_size`, or auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSettings:
    """The choices of a caller of `prepare_teacher`; a `TeacherSpec` holds them resolved."""

    view: ViewSpec
    timesteps: tuple[int, ...]
    batch_size: int
    """Views per pass."""
    taps: tuple[str, ...] | None = None
    """Names of taps; None for the default of `choose_taps`."""
    condition: str | None = None
    """label, null or a class number; None for the default of `choose_condition`."""
    ddim_steps: int | None = None
    """Steps of a DDIM inversion; None to noise the images instead."""
    compile: bool = False
    """Whether torch.compile compiles the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherInput:
    """The input of all passes over one view; threads can make it before the passes run."""

    pixels_CHW: NDArray[np.uint8]
    """RGB, mirrored if the view is."""
    label: int | None
    """The class that conditions the network; None if no class does."""
    noise: tuple[dict[int, NDArray[np.float32]], ...]
    """Per draw: noise (C, H, W) by timestep; empty if the encoding takes no noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherBatch:
    """The inputs of B views as one batch, on the host."""

    pixels_BCHW: Tensor
    """uint8 RGB, each view mirrored if it is a mirrored one."""
    labels_B: Tensor | None
    """int64; None if no class conditions the network."""
    noise: tuple[dict[int, Tensor], ...]
    """Per draw: noise by timestep, fp32 (B, C, H, W); empty if the encoding takes no noise."""

    def changed(self, change: Callable[[Tensor], Tensor]) -> "TeacherBatch":
        """Return the batch with `change` applied to its pixels and its noise, both (B, C, H, W)."""
        noise = tuple(
            {t: change(noise_BCHW) for t, noise_BCHW in draw.items()} for draw in self.noise
        )
        return replace(self, pixels_BCHW=change(self.pixels_BCHW), noise=noise)


class Teacher:
    """A truncated teacher on a device; `spec` holds every constant that its features depend on."""

    def __init__(
        self,
        loaded: LoadedTeacher,
        spec: TeacherSpec,
        view: ViewSpec,
        crop: Box | None,
        compute: Compute,
    ) -> None:
        """Move a loaded teacher to the device, cut off after the last tap of `spec`."""
        self.spec = spec
        self.view = view
        self.encoding = _encoding(loaded, compute, spec.ddim_steps)
        self.crop = crop
        """The crop of the view at which equivariance can be measured; None if there is none."""
        self.denoiser = loaded.denoiser
        """The complete network; it shares its weights with `network`."""
        self.input_shape = (
            loaded.denoiser.channels,
            view.height // loaded.latent_stride,
            view.width // loaded.latent_stride,
        )
        """(C, H, W) of the pixels or latents that are noised."""
        self.prompt = loaded.prompt
        self.class_names = loaded.class_names
        """Names of the classes by number; empty if the model's files do not record them."""
        self.device = compute.device
        self._compute = compute
        self._num_classes = loaded.denoiser.num_classes
        self._null_class = loaded.denoiser.null_class
        self._noise_shape = self.encoding.noise_shape(view.height, view.width)
        self._latents = _on_device(loaded.latents, compute) if loaded.latents is not None else None
        self.network = _on_device(loaded.denoiser.tapped(spec.taps), compute)
        """The network up to the last tap; in evaluation mode, channels last."""
        self._run = compiled(self.network) if spec.compiled else self.network
        self.clock = DeviceClock(compute.device)
        """Time of all passes, including those of the autoencoder and of a DDIM inversion."""

    @property
    def is_random(self) -> bool:
        """Whether features depend on the draw of the noise."""
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
        """Return one view, mirrored if `flip`, with the noise of every draw and timestep.

        `pixels_CHW` are uint8 RGB, not mirrored. `sample_noise` draws the noise from (seed, key,
        timestep, draw, flip). `label` is the sample's own class; only the condition `label` uses
        it.
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
            pixels_CHW=mirrored_CHW, label=self._class_of(label), noise=tuple(map(noise, draws))
        )

    def batch(self, inputs: Sequence[TeacherInput]) -> TeacherBatch:
        """Return views of the same draws as one batch, in pinned memory if the device is a GPU."""

        def stacked(maps: Iterable[Any]) -> Tensor:
            host = torch.from_numpy(np.stack(list(maps)))
            # A copy to the GPU runs asynchronously only from pinned memory.
            return host.pin_memory() if self.device.type == "cuda" else host

        labels = [np.int64(view.label) for view in inputs if view.label is not None]
        return TeacherBatch(
            pixels_BCHW=stacked(view.pixels_CHW for view in inputs),
            labels_B=stacked(labels) if labels else None,
            noise=tuple(
                {t: stacked(view.noise[draw][t] for view in inputs) for t in by_timestep}
                for draw, by_timestep in enumerate(inputs[0].noise)
            ),
        )

    @property
    def conditioned_classes(self) -> int | None:
        """Number of the classes if each image's own label conditions the teacher, else None."""
        condition = self.spec.condition
        is_label = condition is not None and condition.kind == "label"
        return self._num_classes if is_label else None

    def require_labels(self, keys: Iterable[str], labels: Iterable[int | None] | None) -> None:
        """Raise ImagesError if a label is not one of the teacher's classes.

        Only the condition `label` is checked; other conditions use no labels.
        """
        if self.conditioned_classes is not None:
            require_labels(keys, labels, self.conditioned_classes)

    @torch.inference_mode()
    def features(self, batch: TeacherBatch) -> Iterator[dict[str, Tensor]]:
        """Yield, per draw, the raw features by array name: fp32 (B, C, H, W).

        Each draw has the arrays of all timesteps and taps. Latents are computed once for all draws
        and timesteps. A short batch is padded to the recipe's batch size, because the batch shape
        changes the last bits of results. Raises DeviceMemoryError.
        """
        # Batches of another shape, such as crops for equivariance, would each be compiled again.
        compiled_shape = (self.spec.batch_size, 3, self.view.height, self.view.width)
        padded_size = max(self.spec.batch_size, len(batch.pixels_BCHW))
        is_whole = (padded_size, *batch.pixels_BCHW.shape[1:]) == compiled_shape
        run = self._run if is_whole else self.network
        with self.clock.running(), memory_errors(self.spec.batch_size, SMALLER_BATCH):
            count = len(batch.pixels_BCHW)
            clean_BCHW = self.clean(batch)
            labels_B = self.labels(batch)
        for by_timestep in batch.noise:
            features = {}
            for timestep in self.spec.timesteps:
                noise_BCHW = self._padded(by_timestep[timestep]) if self.is_random else None
                with self.clock.running(), memory_errors(self.spec.batch_size, SMALLER_BATCH):
                    arguments = self.encoding.inputs(clean_BCHW, noise_BCHW, timestep, labels_B)
                    with self._compute.autocast():
                        maps = run(*map(_channels_last, arguments))
                for tap in self.spec.taps:
                    features[tap_name(timestep, tap.name)] = maps[tap.name][:count].float()
            yield features

    def clean(self, batch: TeacherBatch) -> Tensor:
        """Return the clean images or latents that are noised: fp32 on the device.

        These are the pixels in [-1, 1], or their latents, padded to the recipe's batch size. The
        autoencoder runs in the network's own precision: bf16 changes latents far less than the
        added noise does, and fp32 would take longer than the network itself.
        """
        pixels_BCHW = self._padded(batch.pixels_BCHW).float() / 127.5 - 1.0
        if self._latents is None:
            return pixels_BCHW
        with self._compute.autocast():
            latents_BCHW: Tensor = self._latents(_channels_last(pixels_BCHW))
        return latents_BCHW.float()

    def labels(self, batch: TeacherBatch) -> Tensor | None:
        """Return the classes that condition the network, int64 on the device.

        The classes are padded to the recipe's batch size.
        """
        return self._padded(batch.labels_B) if batch.labels_B is not None else None

    def _class_of(self, label: int | None) -> int | None:
        """Return the class that conditions the network for a sample with `label`."""
        condition = self.spec.condition
        if condition is None or condition.kind == "prompt":
            return None
        by_kind = {"label": label, "class": condition.number, "null": self._null_class}
        number = by_kind[condition.kind]
        if number is None:
            raise TeacherError(
                f"condition {condition.kind}: expected a class for each sample, got none; call "
                "`require_labels` first"
            )
        return number

    def _padded(self, host: Tensor) -> Tensor:
        """Return a batch on the device, padded with zeros to the recipe's batch size."""
        there = host.to(self.device, non_blocking=True)
        lacking = self.spec.batch_size - len(there)
        return (
            torch.cat([there, there.new_zeros(lacking, *there.shape[1:])]) if lacking > 0 else there
        )


def _channels_last(x: Any) -> Any:
    is_map = isinstance(x, Tensor) and x.dim() == 4
    return x.contiguous(memory_format=torch.channels_last) if is_map else x


def _on_device(network: nn.Module, compute: Compute) -> nn.Module:
    return network.to(compute.device).to(memory_format=torch.channels_last).eval()


def prepare_teacher(loaded: LoadedTeacher, settings: TeacherSettings, compute: Compute) -> Teacher:
    """Find and choose taps, truncate the network and resolve the constants of the recipe.

    Raises ConfigError for a size, tap, timestep, condition or encoding that the teacher does not
    support.
    """
    view = settings.view
    timesteps = settings.timesteps
    steps = len(loaded.alpha_bars)
    for timestep in timesteps:
        if timestep and not loaded.has_timesteps:
            raise ConfigError(
                f"`timestep` {timestep}: this teacher has one timestep, 0; leave `timestep` out"
            )
        if not 0 <= timestep < steps:
            raise ConfigError(
                f"`timestep` {timestep}: this teacher was trained with steps 0 to {steps - 1}"
            )
        if loaded.encoding is None and loaded.alpha_bars[timestep] == 0:
            raise ConfigError(
                f"`timestep` {timestep}: alpha-bar is 0 there, so the network's input is noise "
                "alone and its features do not depend on the image; pass a smaller `timestep`"
            )
        if settings.ddim_steps is not None:
            ddim_levels(timestep, settings.ddim_steps)
    if len(set(timesteps)) != len(timesteps) or not timesteps:
        raise ConfigError(
            f"`timestep`: expected one or several different steps, got {list(timesteps)}"
        )
    if settings.batch_size < 1:
        raise ConfigError(f"`batch_size` {settings.batch_size}: expected at least 1")
    condition = choose_condition(loaded.denoiser, loaded.prompt, settings.condition)
    geometry = (view.height, view.width, loaded.latent_stride)
    offered = loaded.denoiser.find_taps(*geometry)
    blocks = loaded.denoiser.find_blocks(*geometry) if settings.taps is not None else ()
    alpha_bars = tuple(float(loaded.alpha_bars[t]) for t in timesteps)
    spec = TeacherSpec(
        architecture=loaded.architecture,
        weights_sha256=loaded.weights_sha256,
        config_sha256=loaded.config_sha256,
        timesteps=timesteps,
        alpha_bars=alpha_bars,
        taps=choose_taps(offered, settings.taps, blocks, is_noised=loaded.has_timesteps),
        precision=compute.precision,
        batch_size=settings.batch_size,
        device_type=compute.device.type,
        snrs=tuple(map(signal_to_noise, alpha_bars)),
        ddim_steps=settings.ddim_steps,
        condition=condition,
        compiled=settings.compile or None,
    )
    crop = find_crop(loaded.denoiser, offered, view, loaded.latent_stride)
    return Teacher(loaded, spec, view, crop, compute)


def _encoding(loaded: LoadedTeacher, compute: Compute, ddim_steps: int | None) -> Encoding:
    """Return a DDIM inversion if `ddim_steps` is set, else the teacher's encoding or noising."""
    if ddim_steps is None:
        noising = Noising(
            loaded.alpha_bars.to(compute.device), loaded.denoiser.channels, loaded.latent_stride
        )
        return loaded.encoding or noising
    network = _on_device(loaded.denoiser.predictor(), compute)

    def predictor(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        with compute.autocast():
            output_BCHW: Tensor = network(_channels_last(x_BCHW), t_B, labels_B)
        return output_BCHW.float()

    return Inversion(predictor, loaded.alpha_bars, loaded.prediction, ddim_steps)


def native_size(loaded: LoadedTeacher) -> tuple[int, int]:
    """Return the (height, width) of the training images, in pixels.

    Raises ConfigError if the teacher's configuration does not state it.
    """
    size = loaded.denoiser.native_size
    if size is None:
        raise ConfigError("this teacher's configuration has no sample_size; pass `size`")
    return size[0] * loaded.latent_stride, size[1] * loaded.latent_stride
