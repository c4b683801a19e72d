"""timm networks as teachers: a map per block of a ViT, or per stage of a CNN; no noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dtcache.errors import ConfigError, TeacherError, TeacherNotFoundError, one_line
from dtcache.hashing import sha256_json
from dtcache.options.parse import TIMM
from dtcache.recipe import TapSpec
from dtcache.student.backbone import Rgb, nearest_sizes
from dtcache.student.backbone_io import SavedBackbone, load_any_size
from dtcache.student.timm_backbone import hub_repository
from dtcache.student.weights_io import CONFIG, WEIGHTS
from dtcache.teacher.diffusers_files import download_from_hub, hash_weights
from dtcache.teacher.loaded_teacher import LoadedTeacher
from dtcache.teacher.noising import timestep_batch

LOCAL_DIR = "local-dir:"
"""Prefix of a folder in a timm name."""


def load_timm_teacher(name: str) -> LoadedTeacher:
    """Load a timm network by its name, from the hub, or as `local-dir:FOLDER`.

    The folder is one that timm's save_for_hf or a run of dtcache has written: config.json and
    model.safetensors. Pickles are never read. Raises ConfigError for an unknown name,
    TeacherNotFoundError if there is no such folder, WeightsError if the weights do not fit, and
    TeacherError if the network has no maps or the hub cannot be reached.
    """
    root = _folder(name)
    network, saved = load_any_size(root)
    denoiser = TimmDenoiser(network, saved)
    # The size of the position embedding is not hashed: the weights have it.
    config = {
        "architecture": saved.name,
        "model_args": saved.model_args,
        "mean": saved.mean,
        "std": saved.std,
    }
    prefix = int(getattr(network, "num_prefix_tokens", 0) or 0)
    dropped = f"{prefix} prefix tokens (class token, registers) per image are in no map"
    return LoadedTeacher(
        denoiser=denoiser,
        alpha_bars=torch.ones(1),
        architecture=f"{TIMM}{saved.name}",
        weights_sha256=hash_weights(root, [root / WEIGHTS]),
        config_sha256=sha256_json(config),
        schedule="none",
        prediction="features",
        encoding=NormalisedPixels(saved.mean, saved.std),
        notes=(dropped,) if prefix else (),
    )


def _folder(name: str) -> Path:
    """Return the folder of a timm name; of a name of the hub, download its two files."""
    if not name.startswith(LOCAL_DIR):
        return download_from_hub(hub_repository(name), [CONFIG, WEIGHTS])
    root = Path(name.removeprefix(LOCAL_DIR))
    if not root.is_dir():
        raise TeacherNotFoundError(
            f"teacher {TIMM}{name}: no such folder; expected one that timm (save_for_hf) has "
            "written"
        )
    return root


class NormalisedPixels:
    """The encoding of a network that reads images: normalised by mean and deviation, no noise."""

    def __init__(self, mean: Rgb, std: Rgb) -> None:
        """Take mean and standard deviation per channel, of pixels in [0, 1]."""
        self._mean = mean
        self._std = std

    def noise_shape(self, height: int, width: int) -> None:
        """Return None: there is no noise."""
        return None

    def inputs(
        self, clean_BCHW: Tensor, noise_BCHW: Tensor | None, timestep: int, labels_B: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return normalised pixels, the timestep as int64 (B,) and the labels."""
        mean_C11, std_C11 = (
            clean_BCHW.new_tensor(value)[:, None, None] for value in (self._mean, self._std)
        )
        x_BCHW = ((clean_BCHW + 1.0) / 2.0 - mean_C11) / std_C11
        return x_BCHW, timestep_batch(x_BCHW, timestep), labels_B


class TimmDenoiser:
    """A timm network behind the interface of denoisers; it uses neither timestep nor labels."""

    def __init__(self, network: nn.Module, saved: SavedBackbone) -> None:
        """Take over `network`: fp32, in evaluation mode, on the CPU.

        Raises TeacherError if it has no maps.
        """
        info: list[dict[str, Any]] = cast(Any, getattr(network, "feature_info", None) or [])
        if not info or not hasattr(network, "forward_intermediates"):
            raise TeacherError(
                f"{saved.name}: expected a timm network with forward_intermediates, which returns "
                "maps, got one without; use another network"
            )
        self.network = network
        self.channels = 3
        self.native_size: tuple[int, int] | None = saved.input_size
        self.num_classes: int | None = None
        self.null_class: int | None = None
        self._name = saved.name
        self._strides = [int(level["reduction"]) for level in info]
        self._measured: dict[tuple[int, int], list[torch.Size]] = {}

    def find_taps(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return the tap of every block of a ViT, first to last, or of every stage, finest first.

        Raises ConfigError, with the nearest sizes, if the coarsest stride does not divide the
        view, or if the network does not take the size.
        """
        size = (height, width)
        multiple = max(self._strides)
        if height % multiple or width % multiple:
            raise ConfigError(
                f"`size` {height}x{width}: {self._name} reads patches of {multiple} pixels; "
                f"expected both sides to be multiples of {multiple}; pass `size` "
                f"{nearest_sizes(size, multiple)}"
            )
        # A pass takes a second for a large network; each size is measured once.
        if size not in self._measured:
            self._measured[size] = self._measure(height, width)
        taps = []
        for index, (stride, shape) in enumerate(
            zip(self._strides, self._measured[size], strict=True)
        ):
            if tuple(side * stride for side in shape[2:]) != size:
                raise TeacherError(
                    f"{self._name}: expected a map of {height // stride}x{width // stride} values "
                    f"at stride {stride}, got {list(shape)}; use another network"
                )
            taps.append(
                TapSpec(
                    name=self._tap_name(index),
                    block=index,
                    stride=stride,
                    channels=shape[1],
                    height=shape[2],
                    width=shape[3],
                )
            )
        return tuple(sorted(taps, key=lambda tap: tap.stride))

    def find_blocks(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return no taps: `find_taps` has every block and stage."""
        return ()

    def tapped(self, taps: Sequence[TapSpec]) -> nn.Module:
        """Return the network, which ends after the last tapped block or stage."""
        return TappedTimm(self.network, {tap.block: tap.name for tap in taps})

    def predictor(self) -> nn.Module:
        """Return the complete network, which returns its features of the image."""
        return WholeTimm(self.network)

    def _tap_name(self, index: int) -> str:
        """Return blockN on the one grid of a ViT, strideN of a pyramid, else stageN."""
        if len(set(self._strides)) == 1:
            return f"block{index}"
        is_pyramid = len(set(self._strides)) == len(self._strides)
        return f"stride{self._strides[index]}" if is_pyramid else f"stage{index}"

    @torch.inference_mode()
    def _measure(self, height: int, width: int) -> list[torch.Size]:
        """Return the shapes of all maps of one grey view."""
        device = next(self.network.parameters()).device
        names = {index: str(index) for index in range(len(self._strides))}
        try:
            maps = TappedTimm(self.network, names)(torch.zeros(1, 3, height, width, device=device))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            native = "x".join(map(str, self.native_size or ()))
            raise ConfigError(
                f"`size` {height}x{width}: {self._name} does not take this size "
                f"({one_line(error, 200)}); pass `size` {native}"
            ) from error
        return [maps[name].shape for name in names.values()]


class TappedTimm(nn.Module):
    """A timm network that ends after its last tap and returns the tapped maps by name."""

    def __init__(self, network: nn.Module, name_of: dict[int, str]) -> None:
        """Share `network`; `name_of` holds the names of taps by index of block or stage."""
        super().__init__()
        self.network = network
        self.name_of = dict(sorted(name_of.items()))

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor | None = None, labels_B: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the maps (B, C, H, W) as they leave their blocks, without the final norm.

        Prefix tokens are left out.
        """
        maps: list[Tensor] = cast(Any, self.network).forward_intermediates(
            x_BCHW,
            indices=list(self.name_of),
            norm=False,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return dict(zip(self.name_of.values(), maps, strict=True))


class WholeTimm(nn.Module):
    """A complete timm network, behind the arguments of denoisers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor | None = None, labels_B: Tensor | None = None
    ) -> Tensor:
        """Return the features that the network computes last."""
        features: Tensor = cast(Any, self.network).forward_features(x_BCHW)
        return features
