"""What a student minimises: which losses, and how much each tap and each of its bands counts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn, stack

from dtcache.codec import TapCodec
from dtcache.errors import ConfigError
from dtcache.losses.band_weighting import LEAST_WEIGHT, DeterminedBands
from dtcache.losses.features import at_loss, mse_loss
from dtcache.losses.labels import label_loss
from dtcache.options import TrainOptions
from dtcache.recipe import Json

LABEL_TARGET = "labels"
"""Name of the student's logits among its predictions, beside the arrays of features."""
AT_WEIGHT = 10.0
"""The paper's weight of the attention-transfer loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """One batch of teacher features by array, fp32 (B, C, H, W)."""

    whitened: dict[str, Tensor]
    """What the MSE compares with."""
    raw: dict[str, Tensor]
    """In the teacher's own scale: what the attention-transfer loss compares with."""
    labels: Tensor | None = None
    """Logits of the soft labels, fp32 (B, K, H, W), where they are distilled too."""


class Objective(nn.Module):
    """The loss: the mean over taps of a x MSE + b x AT, with factors a and b a tap; it has no weights to train.

    Where there are soft labels: feature weight x that + label weight x H(P_g, P_r) (paper: mixed distillation).
    """

    def __init__(
        self,
        mse: Mapping[str, float],
        at: Mapping[str, float],
        bands: Mapping[str, DeterminedBands] | None = None,
        weights: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Sum the taps of `mse` and of `at`; a tap of `bands` has its MSE weighed band by band.

        `weights` are those of features and labels.
        """
        super().__init__()
        self._weights = weights
        self._mse = dict(mse)
        self._at = dict(at)
        self.bands = nn.ModuleDict(bands or {})

    def forward(self, predicted: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Return `loss` and, a tap, `mse/...` and `at/...` in plain, and `determined_mse/...` where bands are weighed.

        With soft labels `label` is their loss, in plain, and `feature` that of all taps, where there are any.

        Both plain parts are always there, so that runs of different objectives compare; the loss takes what it is of.
        """
        parts: dict[str, Tensor] = {}
        per_tap = []
        for name, whitened_BCHW in targets.whitened.items():
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
        label = label_loss(predicted[LABEL_TARGET], targets.labels)
        feature_weight, label_weight = self._weights
        if not per_tap:
            return {"loss": label_weight * label, "label": label}
        feature = stack(per_tap).mean()
        return {
            "loss": feature_weight * feature + label_weight * label,
            "label": label,
            "feature": feature,
            **parts,
        }


def make_objective(
    options: TrainOptions, fit: Mapping[str, TapCodec], codec: Json, names: Sequence[str]
) -> Objective:
    """Return the objective of some of a cache's arrays, from its codec's fit and the recipe's `codec`.

    Without weights a tap: the mean over taps of MSE + 10 AT (paper: feature loss). A tap's weight u, given and divided
    by the taps' mean, multiplies both. With --noise-weighting d = 1 - (share of noise) multiplies AT, and the MSE too
    where bands cannot be weighed; where they can, they bring their own. Raises ConfigError for options that contradict
    each other.
    """
    _check(options)
    given = (
        _tap_weights(options.tap_weights, names)
        if options.tap_weights
        else dict.fromkeys(names, 1.0)
    )
    share = dict.fromkeys(names, 1.0)
    bands = {}
    if options.noise_weighting:
        share = {name: max(1.0 - float(codec["noise_share"][name]), LEAST_WEIGHT) for name in names}
        if options.crop is None:
            for name in names:
                if (coded := fit[name].bands()) is not None:
                    bands[name] = DeterminedBands(coded, float(codec["step"]))
    total = sum(given[name] * share[name] for name in names) / max(1, len(names))
    whole = {name: given[name] * share[name] / total for name in names}
    mse = {name: given[name] / total if name in bands else whole[name] for name in names}
    weight = (
        (AT_WEIGHT if options.at_weight is None else options.at_weight)
        if options.loss == "mse+at"
        else 1.0
    )
    at = {name: weight * whole[name] for name in names}
    weights = tuple(1.0 if w is None else w for w in (options.feature_weight, options.label_weight))
    return Objective(
        mse if options.loss != "at" else {},
        at if options.loss != "mse" else {},
        bands,
        (weights[0], weights[1]),
    )


def _check(options: TrainOptions) -> None:
    """Raise ConfigError where an option says something about a loss that is not there."""
    if options.loss != "mse+at" and options.at_weight is not None:
        raise ConfigError(
            f"--at-weight {options.at_weight:g} weighs AT beside the MSE, and --loss {options.loss} is one of them "
            "alone; leave --at-weight out or use --loss mse+at"
        )
    if options.loss == "at" and options.whitening == "position":
        raise ConfigError(
            "--whitening position is of the MSE, and --loss at has none; leave one of them out"
        )
    if options.noise_weighting and options.whitening == "position":
        raise ConfigError(
            "--noise-weighting uses shares measured under --whitening sample; they say nothing of --whitening position"
        )


def _tap_weights(text: str, names: Sequence[str]) -> dict[str, float]:
    """Return a weight an array of `stride8=0.5,t150/stride16=2`; 1 where none is given. Raises ConfigError."""
    weights = dict.fromkeys(names, 1.0)
    for part in text.split(","):
        tap, _, number = part.strip().partition("=")
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?", number) or not float(number) > 0:
            raise ConfigError(
                f"--tap-weights {text}: expected taps and numbers over 0, such as stride4=0.5,stride8=1, got {part!r}; "
                "--taps leaves a tap out"
            )
        found = [name for name in names if tap in (name, name.rpartition("/")[2])]
        if not found:
            raise ConfigError(
                f"--tap-weights {tap}: expected one of the taps trained on, {', '.join(names)}"
            )
        weights |= dict.fromkeys(found, float(number))
    return weights
