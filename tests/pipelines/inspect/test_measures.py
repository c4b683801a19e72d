"""Estimates and measures against known populations: intervals, noise, similarity, k-NN, water
lines.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import special_ortho_group
from store.builders import COARSE, FINE

from dtcache.cache.cache import Cache
from dtcache.codec.pca_dct import DEAD
from pipelines.inspect.statistics import measures
from pipelines.inspect.statistics.jackknife import jackknife, proportion
from pipelines.inspect.statistics.similarity import knn_accuracy, similarities
from pipelines.inspect.statistics.sums import Group, empty, rings_of, water_lines


def test_intervals_cover_the_truth() -> None:
    """About 95 % of the jackknife intervals hold the population's ratio, and a census has width 0.

    The same holds with the finite-population correction for a sample of half the population.
    """
    rng = np.random.default_rng(0)
    population = rng.gamma(2.0, size=(4000, 2))
    truth = population[:, 0].sum() / population[:, 1].sum()

    def ratio(parts: list[np.ndarray]) -> float:
        whole = np.concatenate(parts)
        return float(whole[:, 0].sum() / whole[:, 1].sum())

    for share in (0.05, 0.5):
        hits = 0
        for _ in range(400):
            parts = np.array_split(population[rng.permutation(4000)[: int(4000 * share)]], 20)
            found = jackknife(parts, ratio, share)
            hits += found.low <= truth <= found.high
        assert 0.91 <= hits / 400 <= 0.99
    exact = jackknife([population], ratio, 1.0)
    assert exact.low == exact.value == exact.high == pytest.approx(truth)
    alone = jackknife([population], ratio, 0.5)
    assert alone.low is None and alone.high is None


def test_wilsons_interval() -> None:
    """15 of 20 gives [0.531, 0.888], as in tables; 0 of 10 stays in [0, 1]."""
    found = proportion(15, 20)
    assert (found.low, found.high) == (
        pytest.approx(0.531, abs=1e-3),
        pytest.approx(0.888, abs=1e-3),
    )
    assert proportion(0, 10).low == pytest.approx(0, abs=1e-12)


def noisy(cache: Cache, draws: int, noise: float, rows: int = 600) -> Group:
    """Return the sums of maps with a signal of variance 1 and noise of known variance per draw."""
    rng = np.random.default_rng(1)
    signal = rng.normal(size=(rows, 1, 4))
    values = signal + noise**0.5 * rng.normal(size=(rows, draws, 4))
    sums = empty(cache.shape(FINE))
    sums.rows = rows
    sums.maps = rows * draws
    sums.values = values.size
    sums.whitened_C = values.sum((0, 1))
    deviation = np.square(values - values.mean(1, keepdims=True)).sum()
    sums.between_draws = np.array([deviation / (draws - 1) * draws, np.square(values).sum()])
    return Group(sums=sums)


@pytest.mark.parametrize("draws", [2, 4])
def test_noise_share_is_unbiased(tiny_cache: Path, draws: int) -> None:
    """If the noise has 1/3 of the signal's variance, the noise share is 1/4 for any number of
    draws.
    """
    found = measures.noise_share([noisy(Cache(tiny_cache), draws, 1 / 3).sums])
    assert found == pytest.approx(0.25, abs=0.02)


def test_hsic_is_unbiased_and_cka_knows_rotations() -> None:
    """Unbiased HSIC of independent features averages 0, and CKA is 1 under rotation and scaling.

    The biased HSIC is near 1 if there are more channels than samples. The CKA of independent
    features is 0.
    """
    rng = np.random.default_rng(2)
    batches = [(rng.normal(size=(16, 64)), rng.normal(size=(16, 64))) for _ in range(60)]
    independent = [
        (measures.hsic(x, y), measures.hsic(x, x), measures.hsic(y, y)) for x, y in batches
    ]
    assert abs(measures.cka(independent)) < 0.1
    rotation = special_ortho_group.rvs(64, random_state=3)
    rotated = [
        (measures.hsic(x, 3 * x @ rotation), measures.hsic(x, x), measures.hsic(3 * x, 3 * x))
        for x, _ in batches
    ]
    assert measures.cka(rotated) == pytest.approx(1, abs=1e-9)


def groups_of(features: np.ndarray, parts: int = 4) -> list[Group]:
    """Return pooled features as groups of rows."""
    rows = np.array_split(np.arange(len(features)), parts)
    return [Group(sums=None, pooled_rows=r, pooled_RC=features[r].astype(np.float32)) for r in rows]


def test_similarity_is_a_symmetric_matrix_over_common_rows() -> None:
    """CKA is 1 between an array, itself and its rotation; rows that one array lacks are dropped."""
    x = np.random.default_rng(4).normal(size=(80, 5))
    short = groups_of(x @ special_ortho_group.rvs(5, random_state=5))
    short[0] = Group(
        sums=None, pooled_rows=short[0].pooled_rows[2:], pooled_RC=short[0].pooled_RC[2:]
    )
    found = similarities({"a": groups_of(x), "b": short}, 0.1)
    assert found["names"] == ["a", "b"]
    np.testing.assert_allclose(found["value"], [[1, 1], [1, 1]], atol=1e-5)
    assert found["half_width"][0][1] == pytest.approx(0, abs=1e-5)


def test_knn_finds_what_is_there() -> None:
    """k-NN scores 1 on separate classes, chance on shuffled labels and None without two classes."""
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 4, 400)
    features = np.eye(4)[labels] + 0.05 * rng.normal(size=(400, 4))
    found, chance = knn_accuracy(groups_of(features), pa.chunked_array([labels]))
    assert found.value == 1 and chance == np.bincount(labels).max() / 400
    shuffled, _ = knn_accuracy(groups_of(features), pa.chunked_array([rng.permutation(labels)]))
    assert shuffled.low < 0.25 < shuffled.high + 0.05
    assert knn_accuracy(groups_of(features), pa.chunked_array([pa.nulls(400, pa.int32())])) == (
        None,
        None,
    )
    assert knn_accuracy(groups_of(features), pa.chunked_array([np.zeros(400, int)])) == (None, None)
    # Votes are counted by number: labels that are used as they are would take 32 GB.
    extreme = np.array([-(2**31), -1, 2**20, 2**31 - 1], np.int32)[labels]
    assert knn_accuracy(groups_of(features), pa.chunked_array([extreme])) == (found, chance)


@pytest.mark.parametrize("name", [FINE, COARSE])
def test_the_water_line_is_the_quantisers_error(tiny_cache: Path, name: str) -> None:
    """Per component, per ring and overall the water line is the mean squared rounding error.

    The values spread over many steps, and only coded coefficients count.
    """
    fit = Cache(tiny_cache).fit[name]
    channels, height, width = fit.shape
    by_ring: dict[int, list[float]] = {}
    by_component: dict[int, list[float]] = {}
    values = np.random.default_rng(0).uniform(-1, 1, 200_000)
    for k, i, j in np.ndindex(channels, height, width):
        if fit.classes[k, i, j] != DEAD:
            step = float(fit.class_step[fit.classes[k, i, j]])
            spread = values * 50 * step
            error = float(np.square(spread - np.round(spread / step) * step).mean())
            by_ring.setdefault(int(rings_of(height, width)[i, j]), []).append(error)
            by_component.setdefault(k, []).append(error)
    rings, components, level = water_lines(Cache(tiny_cache), name)
    for found, wanted in ((rings, by_ring), (components, by_component)):
        assert {place for place, value in enumerate(found) if value is not None} == set(wanted)
        for place, errors in wanted.items():
            assert found[place] == pytest.approx(np.mean(errors), rel=0.02)
    assert level == pytest.approx(
        np.mean([e for errors in by_ring.values() for e in errors]), rel=0.02
    )
