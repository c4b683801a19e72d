"""The objective equals NumPy's formula for every loss and weight; contradictions are refused."""

import numpy as np
import pytest
import torch

from dtcache.codec import HalfTap
from dtcache.errors import ConfigError
from dtcache.losses.objective import LABEL_TARGET, Objective, Targets, make_objective
from dtcache.options import TrainOptions

FINE = "t150/stride4"
COARSE = "t150/stride8"
NAMES = (FINE, COARSE)
SHAPES = dict.fromkeys(NAMES, (5, 4, 6))
SHARES = {FINE: 0.9, COARSE: 0.2}
CODEC = {"noise_share": SHARES, "step": None}
FIT = {
    name: HalfTap(mean=np.zeros(5, np.float16), grid=np.array([4, 6], np.int32)) for name in NAMES
}
RNG = np.random.default_rng(0)
P, W, R = ({name: RNG.standard_normal((3, 5, 4, 6)) for name in NAMES} for _ in range(3))


def mse(name: str) -> float:
    """Return the mean squared error of one tap."""
    return float(np.square(P[name] - W[name]).mean())


def at(name: str) -> float:
    """Return the attention-transfer loss of one tap, p = 2."""
    q = [np.square(x[name]).sum(1).reshape(3, -1) for x in (P, R)]
    q = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in q]
    return float(np.linalg.norm(q[0] - q[1], axis=1).mean())


def losses(options: TrainOptions) -> dict[str, float]:
    """Return the objective's losses of the random maps."""
    predicted, whitened, raw = (
        {n: torch.from_numpy(x).float() for n, x in maps.items()} for maps in (P, W, R)
    )
    objective = make_objective(options, FIT, CODEC, SHAPES)
    return {
        name: float(x)
        for name, x in objective(predicted, Targets(whitened=whitened, raw=raw)).items()
    }


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, lambda n: (1.0, 0.0)),
        ({"loss": "at"}, lambda n: (0.0, 1.0)),
        ({"loss": "mse+at", "at_weight": 3.0}, lambda n: (1.0, 3.0)),
        ({"loss": "mse+at", "at_weight": 0.0}, lambda n: (1.0, 0.0)),
        # The maps have five channels.
        ({"loss": "dreamteacher"}, lambda n: (5.0, 10.0)),
        # Weights 0.5 and 1.5 already have the mean 1; 1 and 3 are divided by their mean 2.
        (
            {"tap_weights": "stride4=0.5, stride8=1.5", "loss": "dreamteacher"},
            lambda n: (2.5, 5.0) if n == FINE else (7.5, 15.0),
        ),
        (
            {"tap_weights": "t150/stride8=3"},
            lambda n: (0.5, 0.0) if n == FINE else (1.5, 0.0),
        ),
        # Noise shares 0.9 and 0.2 give the weights 0.125 (the minimum) and 0.8, which are divided
        # by their mean 0.4625.
        (
            {"noise_weighting": True, "loss": "mse+at", "at_weight": 2.0},
            lambda n: tuple((0.125 if n == FINE else 0.8) / 0.4625 * x for x in (1, 2)),
        ),
        (
            {"noise_weighting": True, "tap_weights": "stride4=4", "loss": "at"},
            lambda n: (0.0, (0.5 if n == FINE else 0.8) / 0.65),
        ),
    ],
)
def test_the_loss_is_the_mean_of_weighed_parts(options: dict, wanted: object) -> None:
    """Each loss and weighting equals its formula, and both unweighted terms are always returned."""
    found = losses(TrainOptions(**options))
    expected = np.mean([wanted(name)[0] * mse(name) + wanted(name)[1] * at(name) for name in NAMES])
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    for name in NAMES:
        assert (found[f"mse/{name}"], found[f"at/{name}"]) == pytest.approx(
            (mse(name), at(name)), rel=1e-5
        )


def test_the_papers_loss_is_the_squared_norm_per_position_and_ten_times_attention() -> None:
    """`dreamteacher` is the mean over positions of |P - W|^2 over channels, + 10 AT, by taps."""
    per_tap = [
        np.mean(
            [
                np.dot(d, d)
                for d in (P[name] - W[name]).transpose(0, 2, 3, 1).reshape(-1, P[name].shape[1])
            ]
        )
        + 10 * at(name)
        for name in NAMES
    ]
    assert losses(TrainOptions(loss="dreamteacher"))["loss"] == pytest.approx(
        np.mean(per_tap), rel=1e-5
    )


def test_equal_weights_change_no_bit() -> None:
    """Equal tap weights give the unweighted loss bit for bit, whatever their value."""
    assert (
        losses(TrainOptions(tap_weights="stride4=3,stride8=3"))["loss"]
        == losses(TrainOptions())["loss"]
    )


def test_a_part_that_does_not_count_has_no_gradient() -> None:
    """A term without weight has no gradient: under `mse` the gradient is zero at the target."""
    x = torch.from_numpy(W[FINE]).float().requires_grad_()
    targets = Targets(whitened={FINE: x.detach()}, raw={FINE: torch.from_numpy(R[FINE]).float()})
    for weights, moves in (({}, False), ({FINE: 1.0}, True)):
        x.grad = None
        Objective({FINE: 1.0}, weights)({FINE: x}, targets)["loss"].backward()
        assert bool(x.grad.any()) is moves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"at_weight": 10.0},
            r"`at_weight` 10: expected `loss='mse\+at'`, .* got `loss='mse'`",
        ),
        (
            {"loss": "dreamteacher", "at_weight": 3.0},
            r"`at_weight` 3: expected `loss='mse\+at'`, .* got `loss='dreamteacher'`",
        ),
        (
            {"loss": "mse+at"},
            r"`loss='mse\+at'`: expected the weight of AT .*; pass `at_weight`, such as 0.5, or",
        ),
        (
            {"loss": "at", "whitening": "position"},
            r"`whitening='position'`: expected a loss with an MSE, .* got `loss='at'`",
        ),
        (
            {"noise_weighting": True, "whitening": "position"},
            r"`noise_weighting`: expected `whitening='sample'`, under which the shares",
        ),
        (
            {"tap_weights": "stride4"},
            r"`tap_weights` stride4: expected taps and numbers over 0, such as stride4=0.5",
        ),
        ({"tap_weights": "stride4=0"}, r"got 'stride4=0'; pass `taps` to leave a tap out"),
        ({"tap_weights": "stride4=nan"}, r"got 'stride4=nan'"),
        ({"tap_weights": "stride4=1,"}, r"got ''"),
        (
            {"tap_weights": "stride2=1"},
            r"`tap_weights` stride2: expected one of the taps trained on, t150/stride4",
        ),
    ],
)
def test_contradictions_are_refused(options: dict, message: str) -> None:
    """An option that has no effect or names a missing tap is refused with one line."""
    with pytest.raises(ConfigError, match=message):
        make_objective(TrainOptions(**options), FIT, CODEC, SHAPES)


def test_labels_are_weighed_beside_the_features() -> None:
    """The loss is the weighted sum of feature and label loss, both returned unweighted."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 4)
    z = torch.randn(2, 3, 4, 4)
    r = torch.randn(2, 3, 4, 4)
    targets = Targets(whitened={FINE: x}, raw={FINE: x}, labels=z)
    predicted = {FINE: torch.zeros_like(x), LABEL_TARGET: r}
    both = Objective({FINE: 1.0}, {FINE: 10.0}, feature_weight=0.5, label_weight=3.0)(
        predicted, targets
    )
    plain = Objective({FINE: 1.0}, {FINE: 10.0})(
        predicted, Targets(whitened={FINE: x}, raw={FINE: x})
    )
    label = -((z / 4).softmax(1) * (r / 4).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(both["label"], label)
    torch.testing.assert_close(both["feature"], plain["loss"])
    torch.testing.assert_close(both["loss"], 0.5 * plain["loss"] + 3 * label)
    alone = Objective({}, {}, feature_weight=0.0, label_weight=3.0)(
        predicted, Targets(whitened={}, raw={}, labels=z)
    )
    assert set(alone) == {"loss", "label"}
    torch.testing.assert_close(alone["loss"], 3 * label)
