"""Any torch module as a teacher: checked by a dry run, identified by hashes."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dtcache.errors import ConfigError, TeacherError, one_line
from dtcache.hashing import sha256_json
from dtcache.recipe import TapSpec
from dtcache.teacher.loaded_teacher import LoadedTeacher

TAP_NAME = re.compile(r"stride([1-9][0-9]{0,4})")

Prepare = Callable[[Tensor, Tensor, int], Tensor | tuple[Tensor, ...]]
"""(pixels_BCHW, noise_BCHW, timestep) to the module's positional arguments: see CallableTeacher."""


class CallableTeacher:
    """A torch module whose inner maps are cached.

    `taps` gives module paths, as in `module.named_modules()`, by stride against the view:
    {"stride8": "up.2"}. The path "" is the module itself. A tap is the output at its path: a tensor
    (B, C, H, W), or a tuple that begins with one.

    `prepare(pixels_BCHW, noise_BCHW, timestep)` returns the module's argument, or a tuple of
    positional arguments. It is called once per pass, in inference mode and outside autocast, with:

    - pixels_BCHW: fp32 in [-1, 1], RGB, (batch size, 3, H, W) on the device. Mirrored views are
      mirrored already. A short batch is padded with zeros, and their features are dropped.
    - noise_BCHW: standard normal fp32, (batch size, noise_channels, H / noise_stride,
      W / noise_stride) on the device, drawn per sample, timestep, draw and flip.
    - timestep: an int, one of the recipe's timesteps.

    Without `prepare`, the module is called with pixels_BCHW alone. Then no noise is drawn and the
    timestep must be 0.

    The module is switched to evaluation mode and moved to the device. All of it runs in every pass,
    so remove layers that no tap needs.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        taps: Mapping[str, str],
        version: str,
        prepare: Prepare | None = None,
        alpha_bars: Sequence[float] = (1.0,),
        size: tuple[int, int] | None = None,
        noise_channels: int = 3,
        noise_stride: int = 1,
    ) -> None:
        """Check the arguments without running the module.

        Change `version` whenever code of `prepare` or of the module changes results: hashes cover
        weights, taps and class name, not code. `alpha_bars` is the signal's share of the variance
        per timestep, SNR / (1 + SNR); the recipe records it, and its length limits the timesteps.
        `size` is the default view (height, width).

        Raises ConfigError if arguments contradict each other or a path names no module.
        """
        modules = dict(module.named_modules())
        for name, path in taps.items():
            if not TAP_NAME.fullmatch(name):
                raise ConfigError(
                    f"CallableTeacher: tap {name!r}: expected its stride as the name, such as "
                    "stride8"
                )
            if path not in modules:
                raise ConfigError(
                    f"CallableTeacher: tap {name}: {type(module).__name__} has no module {path!r}; "
                    f"it has {_some(modules)}"
                )
        if not taps:
            raise ConfigError(
                "CallableTeacher: expected at least one tap, such as {'stride8': 'up.2'}"
            )
        if not version:
            raise ConfigError(
                "CallableTeacher: expected a `version`, such as '1'; change it when the code "
                "changes"
            )
        if not alpha_bars or not all(0.0 <= a <= 1.0 for a in alpha_bars):
            raise ConfigError(
                "CallableTeacher: `alpha_bars`: expected shares of variance from 0 to 1, one per "
                "timestep"
            )
        if prepare is None and len(alpha_bars) > 1:
            raise ConfigError(
                "CallableTeacher: `alpha_bars` without `prepare`: the module would see no noise; "
                "pass both"
            )
        self.channels = noise_channels
        self.native_size = size
        self.num_classes: int | None = None
        self.null_class: int | None = None
        self._stride = noise_stride
        self._module = module.eval()
        self._prepare = prepare
        self._paths = dict(taps)
        self._version = version
        self._alpha_bars = tuple(alpha_bars)

    @property
    def is_random(self) -> bool:
        """Whether the module takes noise."""
        return self._prepare is not None

    def loaded(self) -> LoadedTeacher:
        """Return the module as `load_teacher` returns a directory, with the module's hashes."""
        name = type(self._module).__qualname__
        config = {
            "class": name,
            "taps": self._paths,
            "version": self._version,
            "alpha_bars": self._alpha_bars,
            "noise": [self.channels, self._stride] if self.is_random else None,
        }
        return LoadedTeacher(
            denoiser=self,
            alpha_bars=torch.tensor(self._alpha_bars),
            architecture=name,
            weights_sha256=weights_sha256(self._module),
            config_sha256=sha256_json(config),
            encoding=self,
        )

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int] | None:
        """Return the (C, H, W) of a view's noise; None without `prepare`."""
        return (
            (self.channels, height // self._stride, width // self._stride)
            if self.is_random
            else None
        )

    def inputs(
        self,
        clean_BCHW: Tensor,
        noise_BCHW: Tensor | None,
        timestep: int,
        labels_B: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Return the module's arguments."""
        if self._prepare is None or noise_BCHW is None:
            return (clean_BCHW,)
        prepared = self._prepare(clean_BCHW, noise_BCHW, timestep)
        return prepared if isinstance(prepared, tuple) else (prepared,)

    def find_taps(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return the taps, finest first, with the shapes of a dry run on one grey view.

        Raises TeacherError if the dry run fails, or if an output is not a map with the stride of
        its tap's name.
        """
        device = next((p.device for p in self._module.parameters()), torch.device("cpu"))
        shape = self.noise_shape(height, width)
        title = f"CallableTeacher: {type(self._module).__name__}"
        try:
            with torch.inference_mode():
                noise_BCHW = torch.zeros(1, *shape, device=device) if shape else None
                pixels_BCHW = torch.zeros(1, 3, height, width, device=device)
                maps = TappedModule(self._module, self._paths)(
                    *self.inputs(pixels_BCHW, noise_BCHW, 0)
                )
        except TeacherError:
            raise
        except Exception as error:  # the user's code may raise anything
            reason = one_line(error, 200)
            raise TeacherError(
                f"{title}: its dry run on a {height}x{width} view failed ({type(error).__name__}: "
                f"{reason}); check that `prepare` returns the module's arguments and that the "
                "module takes this size"
            ) from error
        taps = []
        for index, (name, map_BCHW) in enumerate(maps.items()):
            channels, rows, columns = map_BCHW.shape[1:]
            stride = int(name.removeprefix("stride"))
            if (rows * stride, columns * stride) != (height, width):
                raise TeacherError(
                    f"{title}: tap {name} at {self._paths[name]!r}: expected "
                    f"{height / stride:g}x{width / stride:g} values of a {height}x{width} view, "
                    f"got {rows}x{columns} ({channels} channels); correct its stride"
                )
            taps.append(
                TapSpec(
                    name=name,
                    block=index,
                    stride=stride,
                    channels=channels,
                    height=rows,
                    width=columns,
                )
            )
        return tuple(sorted(taps, key=lambda tap: tap.stride))

    def find_blocks(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return no taps: `find_taps` has every path that was given."""
        return ()

    def tapped(self, taps: Sequence[TapSpec]) -> nn.Module:
        """Return the module as a network that returns the tapped maps by name."""
        return TappedModule(self._module, {tap.name: self._paths[tap.name] for tap in taps})

    def predictor(self) -> nn.Module:
        """Raise ConfigError: the module's prediction is not known."""
        raise ConfigError(
            "`encoding='ddim'`: a CallableTeacher makes its own inputs, and its prediction is not "
            "known; invert the images in `prepare` and use `encoding='ddpm'`"
        )


class TappedModule(nn.Module):
    """A module that returns outputs of its submodules. Hooks exist only during a pass."""

    def __init__(self, module: nn.Module, paths: Mapping[str, str]) -> None:
        super().__init__()
        self.module = module
        self._paths = dict(paths)

    def forward(self, *arguments: Tensor) -> dict[str, Tensor]:
        """Return the maps (B, C, H, W) by name.

        Raises TeacherError if an output is not such a map.
        """
        outputs: dict[str, object] = {}

        def recorder(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: object, output: object) -> None:
                first = output[0] if isinstance(output, tuple) and output else output
                # The next module may overwrite the output in place.
                outputs[name] = first.clone() if isinstance(first, Tensor) else first

            return hook

        handles = [
            self.module.get_submodule(path).register_forward_hook(recorder(name))
            for name, path in self._paths.items()
        ]
        try:
            self.module(*arguments)
        finally:
            for handle in handles:
                handle.remove()
        maps = {}
        for name, path in self._paths.items():
            output = outputs.get(name)
            if not isinstance(output, Tensor) or output.dim() != 4:
                raise TeacherError(
                    f"CallableTeacher: tap {name} at {path!r}: expected a tensor (B, C, H, W), got "
                    f"{_kind(output)}"
                )
            maps[name] = output
        return maps


def weights_sha256(module: nn.Module) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of the state dict's tensors.

    Tensors are sorted by name. Memory layout and device do not change the hash.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
            digest.update(
                tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            )
    return digest.hexdigest()


def _some(modules: Mapping[str, nn.Module]) -> str:
    names = [name for name in modules if name]
    return (
        ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        or "no submodules"
    )


def _kind(output: object) -> str:
    if output is None:
        return "no output: the module did not run"
    return f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
