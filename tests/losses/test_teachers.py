"""The loss of several teachers equals NumPy's formula, with weights, dropping and noise floors."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dtcache.codec import HalfTap
from dtcache.errors import ConfigError
from dtcache.losses.objective import LABEL_TARGET, Targets
from dtcache.losses.teachers import TeacherTargets, kept_teachers, make_teachers_objective
from dtcache.options import TrainOptions

B = 6
NAMES = {"ddpm": ("ddpm/t150/stride4", "ddpm/t150/stride8"), "vit": ("vit/t0/block3",)}
SHAPES = {
    "ddpm/t150/stride4": (5, 4, 6),
    "ddpm/t150/stride8": (3, 2, 3),
    "vit/t0/block3": (4, 2, 2),
}
FLOORS = {"ddpm/t150/stride4": 0.1, "ddpm/t150/stride8": 0.5, "vit/t0/block3": 0.0}
SHARES = {"ddpm/t150/stride4": 0.5, "ddpm/t150/stride8": 0.8, "vit/t0/block3": 0.0}
RNG = np.random.default_rng(0)
P, W, R = (
    {name: RNG.standard_normal((B, *shape)) for name, shape in SHAPES.items()} for _ in "PWR"
)
TEACHERS = [
    TeacherTargets(
        name=teacher,
        names=names,
        fit={
            n: HalfTap(
                mean=np.zeros(SHAPES[n][0], np.float16), grid=np.array(SHAPES[n][1:], np.int32)
            )
            for n in names
        },
        codec={"name": "float16", "step": None, "noise_share": {n: SHARES[n] for n in names}},
        noise_floor={n: FLOORS[n] for n in names},
    )
    for teacher, names in NAMES.items()
]


def mse(name: str) -> NDArray[np.float64]:
    """Return the squared error of one tap per image, (B,)."""
    return np.asarray(np.square(P[name] - W[name]).mean((1, 2, 3)))


def at(name: str) -> NDArray[np.float64]:
    """Return the attention-transfer loss of one tap per image, (B,); p = 2."""
    q = [np.square(x[name]).sum(1).reshape(B, -1) for x in (P, R)]
    q = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in q]
    return np.asarray(np.linalg.norm(q[0] - q[1], axis=1))


def losses(uniforms_BT: NDArray[np.float64] | None = None, **options: Any) -> dict[str, float]:
    """Return the losses of the random maps."""
    predicted, whitened, raw = (
        {n: torch.from_numpy(x).float() for n, x in maps.items()} for maps in (P, W, R)
    )
    objective = make_teachers_objective(TrainOptions(**options), TEACHERS, SHAPES)
    uniforms = None if uniforms_BT is None else torch.from_numpy(uniforms_BT).float()
    found = objective(predicted, Targets(whitened=whitened, raw=raw), uniforms)
    return {name: float(x) for name, x in found.items()}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 3.0)])
@pytest.mark.parametrize("loss", ["mse", "dreamteacher"])
def test_the_loss_is_a_mean_over_teachers_of_means_over_taps(
    loss: str, weights: tuple[float, float]
) -> None:
    """A teacher of two taps weighs as much as one of a single tap, times its own weight."""
    found = losses(loss=loss, teacher_weights=f"ddpm={weights[0]},vit={weights[1]}")
    of_teacher = {}
    for teacher, names in NAMES.items():
        terms = [
            mse(n).mean() if loss == "mse" else SHAPES[n][0] * mse(n).mean() + 10 * at(n).mean()
            for n in names
        ]
        of_teacher[teacher] = sum(terms) / len(names)
        assert found[f"teacher/{teacher}"] == pytest.approx(of_teacher[teacher], rel=1e-5)
    wanted = np.average(list(of_teacher.values()), weights=weights)
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    for name in SHAPES:
        assert found[f"mse/{name}"] == pytest.approx(mse(name).mean(), rel=1e-5)


def test_tap_weights_and_noise_weights_are_divided_by_their_mean_within_a_teacher() -> None:
    """A tap's weight shifts the loss of its own teacher between taps, not between teachers."""
    found = losses(tap_weights="stride4=3,block3=7", noise_weighting=True)
    fine, coarse = 3 * 0.5, 1 * 0.2
    names = NAMES["ddpm"]
    wanted = (fine * mse(names[0]).mean() + coarse * mse(names[1]).mean()) / (fine + coarse)
    assert found["teacher/ddpm"] == pytest.approx(wanted, rel=1e-5)
    assert found["teacher/vit"] == pytest.approx(mse("vit/t0/block3").mean(), rel=1e-5)


@pytest.mark.parametrize("dropping", [0.0, 0.3, 1.0])
def test_each_image_keeps_the_teacher_with_the_highest_loss_above_its_floor(
    dropping: float,
) -> None:
    """The loss of dropping equals the formula image by image; weights are renormalised."""
    uniforms_BT = np.random.default_rng(3).random((B, 2))
    found = losses(uniforms_BT, teacher_dropping=dropping, teacher_weights="vit=2")
    total = 0.0
    kept = np.zeros(2)
    chosen = set()
    for image in range(B):
        own = [np.mean([mse(n)[image] for n in names]) for names in NAMES.values()]
        floor = [np.mean([FLOORS[n] for n in names]) for names in NAMES.values()]
        highest = int(np.argmax(np.subtract(own, floor)))
        chosen.add(highest)
        keeps = [t == highest or uniforms_BT[image, t] >= dropping for t in range(2)]
        kept += keeps
        total += np.average(own, weights=np.array([1.0, 2.0]) * keeps) / B
    assert chosen == {0, 1}  # both cases occur
    assert found["loss"] == pytest.approx(total, rel=1e-5)
    assert [found["kept/ddpm"], found["kept/vit"]] == pytest.approx(list(kept / B))
    plain = losses(teacher_weights="vit=2")
    assert found["teacher/ddpm"] == plain["teacher/ddpm"]
    if dropping == 0.0:
        assert found["loss"] == pytest.approx(plain["loss"], rel=1e-6)


def test_only_the_kept_teachers_have_a_gradient() -> None:
    """With the probability 1 an image teaches with one teacher alone."""
    predicted = {n: torch.from_numpy(x).float().requires_grad_() for n, x in P.items()}
    maps = Targets(
        whitened={n: torch.from_numpy(x).float() for n, x in W.items()},
        raw={n: torch.from_numpy(x).float() for n, x in R.items()},
    )
    options = TrainOptions(teacher_dropping=1.0)
    objective = make_teachers_objective(options, TEACHERS, SHAPES)
    objective(predicted, maps, torch.zeros(B, 2))["loss"].backward()
    moved = [
        [bool(predicted[names[0]].grad[i].any()) for names in NAMES.values()]  # type: ignore[index]
        for i in range(B)
    ]
    assert all(sum(row) == 1 for row in moved)


def test_without_the_floor_another_teacher_is_kept() -> None:
    """The floor decides: a noisy teacher with the larger loss can have the smaller excess."""
    loss_BT = torch.tensor([[1.2, 0.5]])
    dropped_BT = torch.zeros(1, 2)
    assert kept_teachers(loss_BT, dropped_BT, 0.5).tolist() == [[True, False]]
    excess_BT = loss_BT - torch.tensor([1.0, 0.0])
    assert kept_teachers(excess_BT, dropped_BT, 0.5).tolist() == [[False, True]]


def test_labels_are_added_to_the_mean_over_teachers() -> None:
    """With soft labels the loss is feature weight x features + label weight x labels."""
    logits = torch.from_numpy(RNG.standard_normal((B, 3, 4, 4))).float()
    predicted = {n: torch.from_numpy(x).float() for n, x in P.items()} | {LABEL_TARGET: logits * 2}
    maps = {n: torch.from_numpy(x).float() for n, x in W.items()}
    options = TrainOptions(labels="parts", label_weight=3.0, feature_weight=0.5)
    objective = make_teachers_objective(options, TEACHERS, SHAPES)
    found = objective(predicted, Targets(whitened=maps, raw=maps, labels=logits))
    plain = objective(predicted, Targets(whitened=maps, raw=maps))
    assert float(found["feature"]) == pytest.approx(float(plain["loss"]))
    total = 0.5 * float(found["feature"]) + 3.0 * float(found["label"])
    assert float(found["loss"]) == pytest.approx(total)


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({"teacher_weights": "vit=2"}, 1, "`teacher_weights`: expected caches of several teachers"),
        ({"teacher_dropping": 0.5}, 1, "`teacher_dropping`: expected caches of several teachers"),
        ({"teacher_weights": "vt=2"}, 2, "`teacher_weights` vt: expected one of .* ddpm, vit"),
        ({"teacher_weights": "vit=0"}, 2, "expected teachers and numbers over 0, such as ddpm"),
        ({"tap_weights": "stride2=1"}, 2, "`tap_weights` stride2: expected one of the taps"),
    ],
)
def test_weights_of_unknown_teachers_are_refused(
    options: dict[str, Any], count: int, message: str
) -> None:
    """Options that concern no teacher are named in one line."""
    with pytest.raises(ConfigError, match=message):
        make_teachers_objective(TrainOptions(**options), TEACHERS[:count], SHAPES)


def test_dropping_and_noise_weighting_are_refused_together() -> None:
    """The floors are those of the unweighted loss."""
    with pytest.raises(ConfigError, match="`teacher_dropping`: teachers are compared by"):
        TrainOptions(teacher_dropping=0.5, noise_weighting=True)
