"""From gradients to updated weights: optimizer, schedule, clipping, loss scale, EMA."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.optim.lamb import Lamb
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]

NEVER_DECAYED = ("pos_embed", "cls_token", "reg_token", "relative_position_bias_table")
"""Names of parameters that have no weight decay, in whatever module they are."""
MOMENTS = (("step", "exp_avg", "exp_avg_sq"), ("exp_avg", "exp_avg_sq"))
"""Names of a parameter's moments: of AdamW, and of Lamb."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizationSpec:
    """How a network is optimised. The defaults of `kind` and `betas` are the paper's."""

    lr: float
    """Peak learning rate."""
    total_steps: int
    """Steps of the whole run; the learning rate is 0 after them."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decays: tuple[float, ...] | None = None
    """Shares of the steps after which the learning rate is a tenth; None: cosine decay to 0."""
    kind: str = "adamw"
    """adamw or lamb."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moving averages of the gradient and of its square."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the weights that `parameter_groups` decays."""
    fused: bool = True
    """Use the fused AdamW, which rounds differently from the plain one."""
    clip_grad: float | None = None
    """Largest norm of the gradient of all parameters; None: no clipping."""
    ema_decay: float | None = None
    """Decay of the EMA of the weights; None: no EMA."""
    scale_loss: bool = False
    """Scale the loss, which fp16 gradients need."""

    def lr_factor(self, step: int) -> float:
        """Return the share of the peak learning rate at a step."""
        if self.decays is None:
            return warmup_cosine(step, self.warmup_steps, self.total_steps)
        return warmup_decays(step, self.warmup_steps, self.total_steps, self.decays)


class Optimization:
    """A network's optimizer and all state that an update changes, except the network itself."""

    def __init__(self, network: nn.Module, spec: OptimizationSpec) -> None:
        """Optimise the parameters of `network` that require a gradient.

        The EMA starts at the network's weights.
        """
        self._spec = spec
        self._networks = [network]
        groups = parameter_groups(network, spec.lr, spec.weight_decay)
        self._peaks = [spec.lr] * len(groups)
        self._optimizer = make_optimizer(groups, spec)
        self._scaler = torch.amp.GradScaler("cuda", enabled=spec.scale_loss)
        self._average = (
            AveragedModel(network, multi_avg_fn=warmed_up_ema(spec.ema_decay), use_buffers=True)
            if spec.ema_decay is not None
            else None
        )

    def add(self, network: nn.Module, lr_scale: float) -> None:
        """Optimise another network too, at `lr_scale` times the learning rate. It has no EMA."""
        peak = lr_scale * self._spec.lr
        for group in parameter_groups(network, peak, self._spec.weight_decay):
            self._optimizer.add_param_group(group)
            self._peaks.append(peak)
        self._networks.append(network)

    @property
    def averaged(self) -> nn.Module | None:
        """The network with the EMA of its weights and buffers; None without `ema_decay`."""
        return None if self._average is None else self._average.module

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss, multiplied by the loss scale."""
        self._scaler.scale(loss).backward()

    def update(self, step: int) -> float:
        """Take optimizer step `step` (from 0), zero the gradients, update the EMA.

        Returns the learning rate of the step. Gradients are unscaled and clipped first.
        """
        factor = self._spec.lr_factor(step)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        if self._spec.clip_grad is not None:
            self._scaler.unscale_(self._optimizer)
            parameters = [p for network in self._networks for p in network.parameters()]
            nn.utils.clip_grad_norm_(parameters, self._spec.clip_grad)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update_parameters(self._networks[0])
        return self._peaks[0] * factor

    def _states(self) -> dict[str, Any]:
        states = {"optimizer": self._optimizer, "scaler": self._scaler}
        return states if self._average is None else {**states, "average": self._average}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: `optimizer`, `scaler` and, with an EMA, `average`."""
        return {name: value.state_dict() for name, value in self._states().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`; other entries are ignored.

        The hyperparameters stay those of the spec. The loss scale starts anew if the state comes
        from a run that did not scale the loss. Raises ValueError, KeyError, TypeError or
        AttributeError if the state belongs to other parameters or to another grouping of them, or
        has values that training cannot produce.
        """
        moments = self._checked_moments(state["optimizer"])
        if self._average is not None:
            require_same_tensors("average", self._average.state_dict(), state["average"])
            if state["average"]["n_averaged"] < 0:
                raise ValueError("average: its number of updates is negative")
            self._average.load_state_dict(state["average"])
        if state["scaler"] and self._spec.scale_loss:
            for name in self._scaler.state_dict():
                _require_positive(f"scaler: {name}", state["scaler"][name], least=0)
            self._scaler.load_state_dict(state["scaler"])
        self._optimizer.load_state_dict(moments)

    def _checked_moments(self, got: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state with the moments in `got` and the spec's hyperparameters.

        torch checks the number of parameters per group, but not the shapes and values of moments.
        """
        groups: list[dict[str, Any]] = self._optimizer.state_dict()["param_groups"]
        if [group["params"] for group in groups] != [g["params"] for g in got["param_groups"]]:
            raise ValueError("optimizer: its groups have other parameters")
        for mine, theirs in zip(groups, got["param_groups"], strict=True):
            # Lamb counts its steps per group, AdamW per parameter.
            if "step" in theirs:
                mine["step"] = int(_require_positive("optimizer: step", theirs["step"]))
        parameters = [x for group in self._optimizer.param_groups for x in group["params"]]
        names: set[frozenset[str]] = set()
        for number, moments in got["state"].items():
            if number not in range(len(parameters)):
                raise ValueError(f"optimizer: parameter {number} is unknown")
            names.add(frozenset(moments))
            for name, value in moments.items():
                title = f"optimizer: {name} of parameter {number}"
                if name == "step":
                    _require_tensor(title, value, torch.Size([]))
                    _require_positive(title, float(value))
                else:
                    _require_tensor(title, value, parameters[number].shape)
                    if not value.is_floating_point():
                        raise TypeError(f"{title}: expected floating point, got {value.dtype}")
        if names - {frozenset(known) for known in MOMENTS}:
            raise ValueError("optimizer: the moments of some parameters are missing or unknown")
        return {"state": got["state"], "param_groups": groups}


def require_same_tensors(title: str, own: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Raise ValueError unless `got` has tensors of the names, shapes and dtypes of `own`.

    They must be finite. torch would convert other dtypes silently.
    """
    if own.keys() != got.keys():
        differing = sorted(map(str, own.keys() ^ got.keys()))
        raise ValueError(f"{title}: missing or unknown: {', '.join(differing[:3])}")
    for name, mine in own.items():
        _require_tensor(f"{title}: {name}", got[name], mine.shape)
        if got[name].dtype != mine.dtype:
            raise ValueError(f"{title}: {name}: expected {mine.dtype}, got {got[name].dtype}")


def _require_tensor(title: str, value: Any, shape: torch.Size) -> None:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise TypeError(f"{title}: expected a tensor, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{title}: expected the shape {list(shape)}, got {list(value.shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{title}: expected finite values")


def _require_positive(title: str, value: Any, least: float = 1) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{title}: expected a number, got {type(value).__name__}")
    if not least <= value < math.inf:
        raise ValueError(f"{title}: expected {least} or more, got {value}")
    return value


def parameter_groups(network: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return two optimizer groups: parameters with weight decay, and parameters without it.

    As in timm (`param_groups_weight_decay`), parameters of one dimension (norms and biases) and
    those in a timm model's `no_weight_decay()` have none; neither have those in `NEVER_DECAYED`.
    Each group has the order of `network.named_parameters()`.
    """
    exempt = list(_exempt(network))
    decayed: list[Tensor] = []
    undecayed: list[Tensor] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if (
            parameter.ndim <= 1
            or name.rpartition(".")[2] in NEVER_DECAYED
            or any(fnmatchcase(name, pattern) for pattern in exempt)
        ):
            undecayed.append(parameter)
        else:
            decayed.append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr": lr},
        {"params": undecayed, "weight_decay": 0.0, "lr": lr},
    ]


def _exempt(network: nn.Module, prefix: str = "") -> Iterator[str]:
    """Yield patterns of parameter names: the `no_weight_decay()` of each outermost timm model."""
    if hasattr(network, "no_weight_decay"):
        names: Any = network.no_weight_decay
        yield from (f"{prefix}{name}" for name in names())
        return
    for name, child in network.named_children():
        yield from _exempt(child, f"{prefix}{name}.")


def make_optimizer(groups: list[dict[str, Any]], spec: OptimizationSpec) -> torch.optim.Optimizer:
    """Return the optimizer of some parameter groups."""
    if spec.kind == "adamw":
        # The plain AdamW passes over each parameter once per operation. On a CPU that takes an
        # eighth of the step of a narrow student.
        return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, fused=spec.fused)
    # timm clips at norm 1 by default; the paper does not.
    return Lamb(groups, lr=spec.lr, betas=spec.betas, max_grad_norm=None)


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Return the share of the peak rate at `step`: linear warm-up, then cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_decays(step: int, warmup: int, total: int, decays: tuple[float, ...]) -> float:
    """Return the share of the peak rate at `step`: linear warm-up, then a tenth after each decay.

    `decays` are shares of `total`; those of COCO's 1x schedule are 2/3 and 11/12 (Detectron).
    """
    if step < warmup:
        return (step + 1) / warmup
    return float(0.1 ** sum(step >= decay * total for decay in decays))


def warmed_up_ema(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Return an EMA update for `AveragedModel` whose decay is min(decay, (1 + n) / (10 + n)).

    n is the number of updates so far. A constant decay would leave the random initial weights in
    the average of a short run. Integer tensors, such as counters, are copied.
    """

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))
        else:
            torch._foreach_copy_(averaged, current)

    return update
