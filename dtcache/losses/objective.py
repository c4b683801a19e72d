"""The objective of a student: the losses of all taps and labels, weighted by tap and band."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

from torch import Tensor, nn, stack

from dtcache.arguments import require
from dtcache.codec import TapCodec
from dtcache.errors import ConfigError
from dtcache.losses.band_weighting import LEAST_WEIGHT, DeterminedBands
from dtcache.losses.features import at_loss, at_per_image, mse_loss, mse_per_image
from dtcache.losses.labels import label_loss
from dtcache.options import TrainOptions
from dtcache.recipe import Json

LABEL_TARGET = "labels"
"""Name of the student's logits among its predictions; the other names are arrays of features."""
PAPER_AT_WEIGHT = 10.0
"""Weight of the attention-transfer loss in `loss='dreamteacher'` (paper: lambda_AT)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The teacher's features of one batch by array, fp32 (B, C, H, W)."""

    whitened: dict[str, Tensor]
    """Targets of the MSE."""
    raw: dict[str, Tensor]
    """In the teacher's own scale: targets of the attention-transfer loss."""
    labels: Tensor | None = None
    """Logits of the soft labels, fp32 (B, K, H, W); None if labels are not distilled."""

    def __post_init__(self) -> None:
        """Raise ConfigError unless both hold features of the same arrays."""
        require("whitened", self.whitened, Mapping, "tensors by array")
        require("raw", self.raw, Mapping, "tensors by array")
        if self.labels is not None:
            require("labels", self.labels, Tensor, "a tensor (B, K, H, W)")
        if self.whitened.keys() != self.raw.keys():
            raise ConfigError(
                f"`raw`: expected the arrays of `whitened`, {', '.join(self.whitened)}, got "
                f"{', '.join(self.raw) or 'none'}; pass both of each array"
            )


class Objective(nn.Module):
    """The loss: the mean over taps of a x MSE + b x AT with constant factors a and b per tap.

    With soft labels: feature weight x that loss + label weight x H(P_g, P_r) (paper: mixed
    distillation). It has no trainable parameters.
    """

    def __init__(
        self,
        mse: Mapping[str, float],
        at: Mapping[str, float],
        bands: Mapping[str, DeterminedBands] | None = None,
        *,
        feature_weight: float = 1.0,
        label_weight: float = 1.0,
    ) -> None:
        """Take the factors a (`mse`) and b (`at`) by tap; a tap without a factor has no such term.

        The MSE of a tap in `bands` is weighted band by band. Raises ConfigError for a factor that
        is no number of 0 or more.
        """
        super().__init__()
        weights = {"feature_weight": feature_weight, "label_weight": label_weight}
        for argument, factors in (("mse", mse), ("at", at)):
            require(argument, factors, Mapping, "numbers by array")
            weights |= {f"{argument}` of `{name}": factor for name, factor in factors.items()}
        for argument, factor in weights.items():
            require(argument, factor, Real, "a number")
            if not 0 <= factor < math.inf:
                raise ConfigError(
                    f"`{argument}` {factor}: expected a finite number of 0 or more; pass one"
                )
        self._mse = dict(mse)
        self._at = dict(at)
        self._feature_weight = feature_weight
        self._label_weight = label_weight
        self.bands = nn.ModuleDict(bands or {})

    def forward(self, predicted: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Return `loss` and its parts, fp32 scalars.

        Parts are the unweighted `mse/<tap>` and `at/<tap>` of every tap. They are returned even if
        the loss does not contain them, so that runs with different objectives can be compared. If
        bands are weighted, `determined_mse/<tap>` follows. With soft labels there are also the
        unweighted `label` and, if there are taps, `feature`. Raises ConfigError if a tap has no
        prediction or no factor.
        """
        require("targets", targets, Targets, "Targets")
        parts: dict[str, Tensor] = {}
        per_tap = []
        for name, whitened_BCHW in targets.whitened.items():
            _require_known(name, predicted, self._mse | self._at)
            mse = parts[f"mse/{name}"] = mse_loss(predicted[name], whitened_BCHW)
            at = parts[f"at/{name}"] = at_loss(predicted[name], targets.raw[name])
            if name in self.bands:
                mse = self.bands[name](predicted[name].float() - whitened_BCHW)
                parts[f"determined_mse/{name}"] = mse
            terms = [
                factors[name] * part
                for factors, part in ((self._mse, mse), (self._at, at))
                if name in factors
            ]
            per_tap.append(sum(terms[1:], terms[0]))
        if targets.labels is None:
            return {"loss": stack(per_tap).mean(), **parts}
        _require_known(LABEL_TARGET, predicted)
        label = label_loss(predicted[LABEL_TARGET], targets.labels)
        if not per_tap:
            return {"loss": self._label_weight * label, "label": label}
        feature = stack(per_tap).mean()
        return {
            "loss": self._feature_weight * feature + self._label_weight * label,
            "label": label,
            "feature": feature,
            **parts,
        }

    def per_image(self, predicted: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """Return the feature loss of each image, fp32 (B,): a mean over taps, without bands."""
        per_tap = []
        for name, whitened_BCHW in targets.whitened.items():
            terms = []
            if name in self._mse:
                terms.append(self._mse[name] * mse_per_image(predicted[name], whitened_BCHW))
            if name in self._at:
                terms.append(self._at[name] * at_per_image(predicted[name], targets.raw[name]))
            per_tap.append(sum(terms[1:], terms[0]))
        return stack(per_tap).mean(0)

    def noise_loss(self, floors: Mapping[str, float]) -> float:
        """Return the loss that noise alone gives, from its variance per value by array (MSE)."""
        names = self._mse | self._at
        return sum(self._mse.get(name, 0.0) * floors.get(name, 0.0) for name in names) / max(
            1, len(names)
        )


def _require_known(
    name: str, predicted: Mapping[str, Tensor], factors: Mapping[str, float] | None = None
) -> None:
    """Raise ConfigError if a target has no prediction or no factor."""
    if name not in predicted:
        raise ConfigError(
            f"`predicted`: expected a prediction {name}, got {', '.join(predicted) or 'none'}; "
            "build the student for the targets"
        )
    if factors is not None and name not in factors:
        raise ConfigError(
            f"`objective`: expected a factor of {name} in `mse` or `at`, got "
            f"{', '.join(factors) or 'none'}; pass one for every array"
        )


def make_objective(
    options: TrainOptions,
    fit: Mapping[str, TapCodec],
    codec: Json,
    shapes: Mapping[str, tuple[int, int, int]],
) -> Objective:
    """Return the objective for some arrays of a cache; `shapes` are their (C, H, W) by name.

    `fit` holds the arrays' codecs; `codec` is that entry of the cache's recipe. The loss is the
    mean over taps of

    - `mse` (default): MSE, a mean over channels and positions;
    - `at`: AT;
    - `mse+at`: MSE + `at_weight` x AT;
    - `dreamteacher`: C x MSE + 10 AT. C x MSE is the squared norm over the C channels of a
      position, averaged over positions (DreamTeacher, Li et al. 2023: L_MSE + lambda_AT L_AT).

    Tap weights, divided by their mean over taps, multiply both terms. Under `noise_weighting` the
    AT of a tap is weighted by d = 1 - (share of noise); its MSE is weighted band by band if the
    codec has bands and nothing is cropped, and by d otherwise. Raises ConfigError for options that
    contradict each other, and for a name in `shapes` without a codec. Features of a teacher in the
    loop have none: `fit` is then empty, and nothing is weighted by noise.
    """
    require("options", options, TrainOptions, "TrainOptions")
    require("shapes", shapes, Mapping, "shapes (C, H, W) by array")
    require("fit", fit, Mapping, "codecs by array")
    return make_objectives(options, [(fit, codec, shapes)])[0]


Arrays = tuple[Mapping[str, TapCodec], Json, Mapping[str, tuple[int, int, int]]]
"""Codecs by array, the recipe's entry `codec`, and (C, H, W) by array, of one teacher."""


def make_objectives(options: TrainOptions, teachers: Sequence[Arrays]) -> list[Objective]:
    """Return the objective of each teacher, as `make_objective` describes it.

    `tap_weights` may name taps of any teacher. Raises ConfigError.
    """
    names = [name for _, _, shapes in teachers for name in shapes]
    weights = dict.fromkeys(names, 1.0)
    if options.tap_weights:
        weights = _parse_tap_weights(options.tap_weights, names)
    return [_objective(options, arrays, weights) for arrays in teachers]


def _objective(options: TrainOptions, arrays: Arrays, tap_weight: Mapping[str, float]) -> Objective:
    """Return the objective of one teacher, with the given weights by array."""
    fit, codec, shapes = arrays
    for name in shapes:
        if fit and name not in fit:
            raise ConfigError(
                f"`shapes` {name}: expected an array of `fit`, which has {', '.join(fit)}; pass one"
            )
    if options.noise_weighting and not codec.get("noise_share"):
        raise ConfigError("`codec`: expected its `noise_share`; pass cache.recipe['codec']")
    at_weight = _at_weight(options)
    _require_consistent(options)
    names = list(shapes)
    share = dict.fromkeys(names, 1.0)
    bands = {}
    if options.noise_weighting:
        share = {name: max(1.0 - float(codec["noise_share"][name]), LEAST_WEIGHT) for name in names}
        if options.scale is None:
            for name in names:
                if (coded := fit[name].bands()) is not None:
                    bands[name] = DeterminedBands(coded, float(codec["step"]))
    mean = sum(tap_weight[name] * share[name] for name in names) / max(1, len(names))
    weight = {name: tap_weight[name] * share[name] / mean for name in names}
    mse = {name: tap_weight[name] / mean if name in bands else weight[name] for name in names}
    if options.loss == "dreamteacher":
        mse = {name: shapes[name][0] * factor for name, factor in mse.items()}
    return Objective(
        mse if options.loss != "at" else {},
        {name: at_weight * weight[name] for name in names} if options.loss != "mse" else {},
        bands,
        feature_weight=1.0 if options.feature_weight is None else options.feature_weight,
        label_weight=1.0 if options.label_weight is None else options.label_weight,
    )


def _at_weight(options: TrainOptions) -> float:
    """Return the weight of AT. Raises ConfigError if `mse+at` has none, or another loss has one."""
    if options.loss == "mse+at":
        if options.at_weight is None:
            raise ConfigError(
                "`loss='mse+at'`: expected the weight of AT beside the MSE; pass `at_weight`, such "
                "as 0.5, or use `loss='dreamteacher'`, whose weights are the paper's"
            )
        return options.at_weight
    if options.at_weight is not None:
        raise ConfigError(
            f"`at_weight` {options.at_weight:g}: expected `loss='mse+at'`, in which it weights AT "
            f"relative to the MSE, got `loss='{options.loss}'`; leave `at_weight` out"
        )
    return PAPER_AT_WEIGHT if options.loss == "dreamteacher" else 1.0


def _require_consistent(options: TrainOptions) -> None:
    """Raise ConfigError if an option concerns a loss that the other options exclude."""
    if options.loss == "at" and options.whitening == "position":
        raise ConfigError(
            "`whitening='position'`: expected a loss with an MSE, whose targets it whitens, got "
            "`loss='at'`; leave one of them out"
        )
    if options.noise_weighting and options.whitening == "position":
        raise ConfigError(
            "`noise_weighting`: expected `whitening='sample'`, under which the shares of noise "
            "were measured, got `whitening='position'`; leave one of them out"
        )


def _parse_tap_weights(text: str, names: Sequence[str]) -> dict[str, float]:
    """Parse `stride8=0.5,t150/stride16=2` to a weight per array, 1 by default.

    A stride without a timestep names the taps of all timesteps and teachers. Raises ConfigError.
    """
    weights = dict.fromkeys(names, 1.0)
    for entry in text.split(","):
        tap, _, number = entry.strip().partition("=")
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?", number) or not float(number) > 0:
            raise ConfigError(
                f"`tap_weights` {text}: expected taps and numbers over 0, such as "
                f"stride4=0.5,stride8=1, got {entry!r}; pass `taps` to leave a tap out"
            )
        matches = [name for name in names if f"/{name}".endswith(f"/{tap}")]
        if not matches:
            raise ConfigError(
                f"`tap_weights` {tap}: expected one of the taps trained on, {', '.join(names)}"
            )
        weights |= dict.fromkeys(matches, float(number))
    return weights
