"""The loss of a student of several teachers: a mean over teachers of each teacher's own loss.

Shapes: B batch, C channels, H rows, W columns, T teachers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dtcache.codec import TapCodec
from dtcache.errors import ConfigError
from dtcache.losses.labels import label_loss
from dtcache.losses.objective import LABEL_TARGET, Objective, Targets, make_objectives
from dtcache.options import TrainOptions
from dtcache.recipe import Json


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherTargets:
    """The arrays of one teacher that a student regresses, and what is known of them."""

    names: tuple[str, ...]
    """Arrays: timestep by timestep, the finest tap first. They begin with the teacher's name."""
    name: str = ""
    """Empty if there is one teacher only."""
    architecture: str = ""
    weights_sha256: str | None = None
    """None for a teacher in the loop."""
    fit: Mapping[str, TapCodec] = field(default_factory=dict)
    """Codecs by array; empty for a teacher in the loop. Of several caches, those of the first."""
    codec: Json = field(default_factory=dict)
    """As in a recipe, by the names of these arrays; empty for a teacher in the loop."""
    noise_floor: Mapping[str, float] = field(default_factory=dict)
    """By array, if measured: the variance per value that is the teacher's noise."""
    crop_error: Mapping[str, float] = field(default_factory=dict)
    """By array, if measured: the error of the features of a crop against the cropped features."""


class TeachersObjective(nn.Module):
    """The mean over teachers of their losses, each a mean over the teacher's own taps.

    A teacher with many taps thus counts as much as a teacher with one. The loss of one teacher
    alone is that of its `Objective`. It has no trainable parameters.
    """

    weights_T: Tensor
    floors_T: Tensor

    def __init__(
        self,
        objectives: Sequence[Objective],
        teachers: Sequence[TeacherTargets],
        *,
        weights: Sequence[float],
        floors: Sequence[float],
        dropping: float | None = None,
        feature_weight: float = 1.0,
        label_weight: float = 1.0,
    ) -> None:
        """Combine the objectives of teachers, in their order.

        `weights` are relative. `floors` are the losses that the noise of each teacher alone gives.
        `dropping` is the probability of `kept_teachers`; None drops no teacher.
        """
        super().__init__()
        self.objectives = nn.ModuleList(objectives)
        self.dropping = dropping
        self._teachers = tuple(teachers)
        self._feature_weight = feature_weight
        self._label_weight = label_weight
        self.register_buffer("weights_T", torch.tensor(weights, dtype=torch.float32))
        self.register_buffer("floors_T", torch.tensor(floors, dtype=torch.float32))

    @property
    def weights_bands(self) -> bool:
        """Whether the MSE of a tap is weighted band by band."""
        return any(objective.bands for objective in self._objectives())

    def forward(
        self, predicted: Mapping[str, Tensor], targets: Targets, uniforms_BT: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return `loss` and its parts, fp32 scalars.

        Parts are those of each teacher's `Objective` and, if there are several teachers, the loss
        `teacher/<name>` of each. With `uniforms_BT`, numbers in [0, 1), teachers are dropped per
        image, and `kept/<name>` is the share of images that keep the teacher.
        """
        if len(self._teachers) == 1:
            alone: dict[str, Tensor] = self.objectives[0](predicted, targets)
            return alone
        parts: dict[str, Tensor] = {}
        losses = []
        per_image = []
        for objective, teacher in zip(self._objectives(), self._teachers, strict=True):
            own = Targets(
                whitened={name: targets.whitened[name] for name in teacher.names},
                raw={name: targets.raw[name] for name in teacher.names},
            )
            with torch.set_grad_enabled(torch.is_grad_enabled() and uniforms_BT is None):
                of_teacher: dict[str, Tensor] = objective(predicted, own)
            losses.append(of_teacher.pop("loss"))
            parts |= of_teacher
            if uniforms_BT is not None:
                per_image.append(objective.per_image(predicted, own))
        shown = {f"teacher/{t.name}": x for t, x in zip(self._teachers, losses, strict=True)}
        weights_T = self.weights_T
        if uniforms_BT is None or self.dropping is None:
            feature = (weights_T * torch.stack(losses)).sum() / weights_T.sum()
        else:
            loss_BT = torch.stack(per_image, 1)
            kept_BT = kept_teachers(loss_BT.detach() - self.floors_T, uniforms_BT, self.dropping)
            weights_BT = weights_T * kept_BT
            feature = ((weights_BT * loss_BT).sum(1) / weights_BT.sum(1)).mean()
            shares = kept_BT.float().mean(0)
            shown |= {f"kept/{t.name}": x for t, x in zip(self._teachers, shares, strict=True)}
        if targets.labels is None:
            return {"loss": feature, **shown, **parts}
        label = label_loss(predicted[LABEL_TARGET], targets.labels)
        loss = self._feature_weight * feature + self._label_weight * label
        return {"loss": loss, "label": label, "feature": feature, **shown, **parts}

    def _objectives(self) -> list[Objective]:
        return [module for module in self.objectives if isinstance(module, Objective)]


def kept_teachers(excess_BT: Tensor, uniforms_BT: Tensor, dropping: float) -> Tensor:
    """Return whether each image keeps each teacher, bool (B, T).

    An image keeps the teacher with the highest loss above its noise floor (`excess_BT`), and drops
    each other one with the probability `dropping` (teacher dropping: UNIC, Sariyildiz et al. 2024;
    DUNE, Sariyildiz et al. 2025).
    """
    kept_BT = uniforms_BT >= dropping
    return kept_BT.scatter(1, excess_BT.argmax(1, keepdim=True), True)


def make_teachers_objective(
    options: TrainOptions,
    teachers: Sequence[TeacherTargets],
    shapes: Mapping[str, tuple[int, int, int]],
) -> TeachersObjective:
    """Return the objective of some teachers; `shapes` are (C, H, W) by array.

    Each teacher has the objective that `make_objective` returns for it alone. Raises ConfigError
    for options that contradict each other, and for options of several teachers if there is one.
    """
    for name in ("teacher_weights", "teacher_dropping"):
        if len(teachers) == 1 and getattr(options, name) is not None:
            raise ConfigError(
                f"`{name}`: expected caches of several teachers, got one teacher; leave `{name}` "
                "out"
            )
    objectives = make_objectives(
        options,
        [(t.fit, t.codec, {name: shapes[name] for name in t.names}) for t in teachers],
    )
    # The floor was measured under whitening per sample.
    floors = [t.noise_floor if options.whitening == "sample" else {} for t in teachers]
    return TeachersObjective(
        objectives,
        teachers,
        weights=_weights(options.teacher_weights, [teacher.name for teacher in teachers]),
        floors=[o.noise_loss(floor) for o, floor in zip(objectives, floors, strict=True)],
        dropping=options.teacher_dropping,
        feature_weight=1.0 if options.feature_weight is None else options.feature_weight,
        label_weight=1.0 if options.label_weight is None else options.label_weight,
    )


def _weights(text: str | None, names: Sequence[str]) -> list[float]:
    """Parse `dinov3=2,ddpm=0.5` to a weight per teacher, 1 by default. Raises ConfigError."""
    weights = dict.fromkeys(names, 1.0)
    for entry in text.split(",") if text is not None else ():
        name, _, number = entry.strip().partition("=")
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?", number) or not float(number) > 0:
            raise ConfigError(
                f"`teacher_weights` {text}: expected teachers and numbers over 0, such as "
                f"{names[0]}=0.5, got {entry!r}; leave the cache of a teacher out to drop it"
            )
        if name not in weights:
            raise ConfigError(
                f"`teacher_weights` {name}: expected one of the teachers, {', '.join(names)}"
            )
        weights[name] = float(number)
    return list(weights.values())
