"""The fit recovers planted structure, and contradictory fitted arrays are refused."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from codec.codec_samples import random_fit

from dtcache.codec import FeatureEncoder, FittedTap, sha256_fit
from dtcache.codec.fit import determined_error, half_fits, quantised_fit, solve_step, tap_statistics
from dtcache.codec.pca_dct import Decoder, Encoder
from dtcache.errors import CodecError

DEVIATIONS = np.array([3.0, 2.0, 1.4, 1.0, 0.7, 0.4])


def planted(
    views: int, shares: np.ndarray, seed: int, size: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Return (2, M, 6, H, W) features of a planted basis whose components differ by `shares`."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    signal, first, second = rng.normal(size=(3, views, 6, size, size)) * DEVIATIONS[:, None, None]
    share = shares[:, None, None]
    draws = np.stack(
        [np.sqrt(1 - share) * signal + np.sqrt(share) * noise for noise in (first, second)]
    )
    return np.einsum("dmkhw,ck->dmchw", draws, basis).astype(np.float16), basis


def test_pca_finds_a_planted_basis() -> None:
    """PCA finds planted directions by falling variance; the largest entry fixes each sign."""
    whitened, basis = planted(96, np.zeros(6), seed=0)
    found = tap_statistics(whitened).basis.astype(np.float64)
    assert np.abs((found * basis).sum(0)).min() > 0.995
    np.testing.assert_allclose(found.T @ found, np.eye(6), atol=3e-3)
    assert (found[np.abs(found).argmax(0), np.arange(6)] > 0).all()


def test_pca_of_one_view_is_the_identity_reordered() -> None:
    """With one view the basis is a permutation of the identity, by falling channel variance."""
    whitened, _ = planted(1, np.full(6, 0.2), seed=1)
    basis = tap_statistics(whitened).basis
    np.testing.assert_array_equal(np.sort(basis, axis=None), [0] * 30 + [1] * 6)
    assert (basis.sum(0) == 1).all() and (basis.sum(1) == 1).all()
    variance = whitened.astype(np.float64).var(axis=(0, 1, 3, 4))
    np.testing.assert_array_equal(basis.argmax(0), np.argsort(-variance))


def test_moments_are_numpys() -> None:
    """The means are NumPy's, and the bands' mean squares sum to the variance (Parseval)."""
    whitened, _ = planted(50, np.full(6, 0.3), seed=2)
    whitened = (whitened + np.arange(6, dtype=np.float16)[:, None, None]).astype(np.float16)
    found = tap_statistics(whitened)
    x = whitened.astype(np.float64)
    np.testing.assert_allclose(
        found.mean.astype(np.float64), x.mean((0, 1, 3, 4)), rtol=2e-3, atol=2e-3
    )
    total = np.square(x - x.mean((0, 1, 3, 4), keepdims=True)).sum((2, 3, 4)).mean()
    np.testing.assert_allclose(found.variance.sum(), total, rtol=3e-3)
    assert found.coefficients.shape == (2, 50, 6, 8, 8)


def test_a_teacher_without_noise_is_fitted_on_one_draw() -> None:
    """One draw gives the same fit as two equal draws: no noise, and the same step in every band."""
    whitened, _ = planted(40, np.full(6, 0.4), seed=3)
    one = tap_statistics(whitened[:1])
    two = tap_statistics(np.stack([whitened[0], whitened[0]]))
    assert not one.noise_share.any()
    np.testing.assert_allclose(one.variance, two.variance, rtol=1e-12)
    np.testing.assert_array_equal(one.coefficients, two.coefficients)
    assert np.ptp(quantised_fit(one, 0.5).class_step) == 0
    assert np.ptp(quantised_fit(tap_statistics(whitened), 0.5).class_step) > 0
    fitted = quantised_fit(one, 0.5)
    c = one.coefficients[0].reshape(40, -1)
    q = np.sign(c[:, fitted.live]) * np.floor(np.abs(c[:, fitted.live]) / 0.5 + 0.42)
    error = np.square(c).sum() - np.square(c[:, fitted.live]).sum()
    gain = fitted.class_gain[fitted.classes.reshape(-1)[fitted.live]]
    error += np.square(c[:, fitted.live] - q * 0.5 * gain).sum()
    assert determined_error(one, fitted) == pytest.approx(error / np.square(c).sum(), rel=1e-3)


def test_noise_share_is_the_planted_one() -> None:
    """The estimated noise share of each component is within 0.06 of the planted share."""
    shares = np.array([0.05, 0.2, 0.4, 0.6, 0.8, 1.0])
    whitened, _ = planted(96, shares, seed=3)
    found = tap_statistics(whitened).noise_share
    assert found.min() >= 0 and found.max() <= 1
    np.testing.assert_allclose(found.mean((1, 2)), shares, atol=0.06)


def test_a_smaller_step_gives_a_smaller_error() -> None:
    """A smaller step gives a smaller error and larger payloads."""
    whitened, _ = planted(64, np.full(6, 0.3), seed=4)
    statistics = tap_statistics(whitened)
    x = torch.from_numpy(whitened[0].astype(np.float32))
    errors = []
    sizes = []
    for step in (4.0, 2.0, 1.0, 0.5, 0.25, 0.1):
        fitted = quantised_fit(statistics, step)
        errors.append(float(Encoder(fitted)(x)[1].sum()))
        encoder = FeatureEncoder({"t1/stride1": fitted}, torch.device("cpu"))
        sizes.append(sum(len(v.section) for v in encoder.encode("t1/stride1", x)))
    assert (np.diff(errors) < 0).all()
    assert (np.diff(sizes) > 0).all()
    assert errors[-1] < 0.01 * float((x**2).sum())


def test_noisy_bands_get_wider_steps() -> None:
    """A band's step is the global step divided by its determined share, by at most 8."""
    shares = np.array([0.0, 0.0, 0.5, 0.75, 1.0, 1.0])
    whitened, _ = planted(96, shares, seed=5)
    fitted = quantised_fit(tap_statistics(whitened), 0.02)
    steps = fitted.class_step[fitted.classes] / np.float32(0.02)
    np.testing.assert_allclose(np.log2(np.median(steps, axis=(1, 2))), [0, 0, 1, 2, 3, 3], atol=0.3)
    np.testing.assert_allclose(2 * np.log2(steps), np.rint(2 * np.log2(steps)), atol=1e-5)


def test_gains_undo_shrinkage_within_their_range() -> None:
    """Every class's gain lies in [1, 2.5], and a fine step needs a gain near 1."""
    whitened, _ = planted(64, np.full(6, 0.1), seed=6)
    statistics = tap_statistics(whitened)
    coarse, fine = (quantised_fit(statistics, step).class_gain for step in (3.0, 0.02))
    assert coarse.min() >= 1 and coarse.max() <= 2.5
    assert coarse.max() > 1.2
    assert fine.max() < 1.02


def test_a_fit_for_distortion_has_flat_steps_and_the_least_error() -> None:
    """A fit for distortion has one step for all bands and gains of the least squared error."""
    whitened, _ = planted(64, np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), seed=11)
    fitted = quantised_fit(tap_statistics(whitened), 1.5, "distortion")
    assert len(fitted.class_step) > 3
    assert (fitted.class_step == np.float32(1.5)).all()
    x = torch.from_numpy(whitened[0].astype(np.float32))
    least = float(Encoder(fitted)(x)[1].sum())
    for j in range(len(fitted.class_gain)):
        for factor in (0.95, 1.05):
            gain = fitted.class_gain * np.where(
                np.arange(len(fitted.class_gain)) == j, factor, 1
            ).astype(np.float32)
            assert float(Encoder(replace(fitted, class_gain=gain))(x)[1].sum()) > least


@pytest.mark.parametrize("ratio", [4.0, 12.0])
def test_solve_step_meets_a_target_in_real_payloads(ratio: float) -> None:
    """Over two taps that share the solved step, real payloads meet the target within 5 %."""
    taps = {
        "t1/stride1": planted(24, np.full(6, 0.3), seed=7)[0],
        "t1/stride2": planted(24, np.zeros(6), seed=8)[0],
    }
    statistics = {name: tap_statistics(x) for name, x in taps.items()}

    def size_of(fit: dict[str, FittedTap]) -> float:
        encoder = FeatureEncoder(fit, torch.device("cpu"))
        return sum(
            float(
                np.mean(
                    [
                        len(v.section)
                        for v in encoder.encode(name, torch.from_numpy(x[0].astype(np.float32)))
                    ]
                )
            )
            for name, x in taps.items()
        )

    target = sum(2 * x[0, 0].size for x in taps.values()) / ratio
    solved = solve_step(statistics, size_of, target)
    assert abs(size_of(solved.fit) / target - 1) < 0.05
    assert solved.bytes_per_view == size_of(solved.fit)
    assert sha256_fit(solved.fit) == sha256_fit(
        {n: quantised_fit(s, solved.step) for n, s in statistics.items()}
    )


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("step", [0.3, 1.0])
def test_determined_error_is_the_bias_given_the_image(share: float, step: float) -> None:
    """The determined error is the error of the mean decoded map of many draws, over the signal."""
    rng = np.random.default_rng(11)
    signal, *noise = (
        rng.normal(size=(3, 600, 1, 4, 4))
        * np.sqrt([1 - share, share, share])[:, None, None, None, None]
    )
    statistics = tap_statistics(np.stack([signal + n for n in noise]).astype(np.float16))
    fitted = quantised_fit(statistics, step)
    encoder = Encoder(fitted)
    decoder = Decoder(fitted)
    error = np.zeros((2, *signal.shape))
    for k in range(200):
        x = torch.from_numpy(
            (signal + rng.normal(size=signal.shape) * np.sqrt(share)).astype(np.float32)
        )
        error[k % 2] += (decoder(encoder(x)[0]).numpy() - signal) / 100
    wanted = (error[0] * error[1]).sum() / np.square(signal).sum()
    assert determined_error(statistics, fitted) == pytest.approx(wanted, abs=0.04)


def test_half_fits_cost_what_float16_costs() -> None:
    """Float16 features have no step, no error and the size of their padded payloads."""
    statistics = {"t1/stride1": tap_statistics(planted(8, np.zeros(6), seed=12)[0])}
    solved = half_fits(statistics)
    assert (solved.step, solved.determined_error) == (None, {"t1/stride1": 0.0})
    assert solved.fit["t1/stride1"].shape == (6, 8, 8)
    assert solved.bytes_per_view == solved.fit["t1/stride1"].section_bound == 8 + 2 * 6 * 8 * 8 + 8


def test_solve_step_returns_the_coarsest_for_an_impossible_target() -> None:
    """For an impossible target, the coarsest step is returned with its true cost."""
    statistics = {"t1/stride1": tap_statistics(planted(8, np.zeros(6), seed=9)[0])}
    solved = solve_step(statistics, lambda fit: 100.0 + len(fit["t1/stride1"].live), 1.0)
    assert solved.bytes_per_view == 100.0
    assert len(solved.fit["t1/stride1"].live) == 0


def test_fitting_twice_gives_the_same_bytes() -> None:
    """Two fits of the same features agree in every bit."""
    whitened, _ = planted(40, np.full(6, 0.3), seed=10)
    first, second = (
        {"t1/stride1": quantised_fit(tap_statistics(whitened.copy()), 0.37)} for _ in range(2)
    )
    assert sha256_fit(first) == sha256_fit(second)


CONTRADICTIONS = {
    "mean of another length": {"mean": np.zeros(2, np.float16)},
    "more components than channels": {"basis": np.ones((1, 2), np.float16)},
    "classes of another component count": {"classes": np.zeros((2, 1, 5), np.uint8)},
    "a class without a step": {"classes": np.full((1, 1, 5), 3, np.uint8)},
    "fewer gains than steps": {"class_gain": np.ones(2, np.float32)},
    "fewer table numbers than steps": {"class_table": np.zeros(2, np.uint8)},
    "a class without a table": {"class_table": np.array([0, 1, 3], np.uint8)},
    "fewer half widths than tables": {"half_width": np.ones(2, np.uint8)},
    "a table that sums to 2047": {"tables": np.array([[1023, 500, 500, 24]] * 3, np.uint16)},
    "a half width beyond its table": {"half_width": np.full(3, 127, np.uint8)},
    "a step that is not finite": {"class_step": np.array([1, np.nan, 1], np.float32)},
    "a gain that is not finite": {"class_gain": np.array([1, np.inf, 1], np.float32)},
    "a basis that is not finite": {"basis": np.full((1, 1), np.nan, np.float16)},
    "a mean that is not finite": {"mean": np.full(1, np.inf, np.float16)},
    "half widths without tables": {
        "tables": np.zeros((0, 4), np.uint16),
        "class_table": np.zeros(0, np.uint8),
        "class_step": np.zeros(0, np.float32),
        "class_gain": np.zeros(0, np.float32),
        "classes": np.full((1, 1, 5), 255, np.uint8),
    },
    "a table number under zero": {"class_table": np.array([-1, 0, 1], np.int8)},
    "a table number far under zero": {"class_table": np.array([-(2**20), 0, 1], np.int32)},
    "a frequency under zero": {"tables": np.array([[4096, -2048, 0, 0]] * 3, np.int64)},
    "a class under zero": {"classes": np.full((1, 1, 5), -1, np.int64)},
    "a half width under zero": {"half_width": np.full(3, -1, np.int64)},
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_contradicting_arrays_are_refused(what: str) -> None:
    """Arrays that contradict each other raise CodecError before any payload is read."""
    with pytest.raises(
        CodecError, match=r"codec arrays contradict each other; the cache is damaged"
    ):
        FittedTap(**{**random_fit(5, 0).arrays(), **CONTRADICTIONS[what]})


@pytest.mark.parametrize("field", [f.name for f in fields(FittedTap)])
def test_arrays_of_another_type_are_refused(field: str) -> None:
    """Arrays of another dtype, byte order or number of axes than specified are refused."""
    arrays = random_fit(5, 0).arrays()
    array = arrays[field]
    others = [
        np.float64,
        np.int64,
        np.int8,
        array.dtype.newbyteorder() if array.itemsize > 1 else np.uint16,
    ]
    for other in (*(array.astype(kind) for kind in others), array[None], array.reshape(-1)[0]):
        with pytest.raises(CodecError, match="codec arrays contradict each other"):
            FittedTap(**{**arrays, field: other})


def test_fit_hash_covers_every_array() -> None:
    """The hash changes with any entry, dtype or tap name, and equal copies have equal hashes."""
    fitted = random_fit(20, 4)
    hashes = {sha256_fit({"t1/stride1": fitted}), sha256_fit({"t1/stride2": fitted})}
    assert len(hashes) == 2
    assert (
        sha256_fit({"t1/stride1": FittedTap(**{n: a.copy() for n, a in fitted.arrays().items()})})
        in hashes
    )
    for field in fields(FittedTap):
        changed = getattr(fitted, field.name).copy()
        if field.name == "tables":
            row = changed[0]
            most = int(changed[0].argmax())
            row[most] -= 1
            row[(most + 1) % 3] += 1
        elif field.name == "classes":
            changed[0, 0, 0] = (changed[0, 0, 0] + 1) % 3
        elif field.name == "class_table":
            changed[0] = (changed[0] + 1) % 3
        elif field.name == "half_width":
            changed[0] -= 1
        else:
            changed.reshape(-1)[0] += 0.5
        hashes.add(
            sha256_fit({"t1/stride1": FittedTap(**{**fitted.arrays(), field.name: changed})})
        )
    assert len(hashes) == 2 + len(fields(FittedTap))
    both = {"a": fitted, "b": random_fit(20, 5)}
    assert sha256_fit(both) == sha256_fit(dict(reversed(both.items())))
