"""Probes of frozen features: k-NN against plain loops, the linear probe against scikit-learn."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from dtcache.errors import ConfigError, ImagesError
from dtcache.metrics.probes import C_GRID, FOLDS, Neighbours, at_edge, knn_predict, linear_predict

CPU = torch.device("cpu")


def clusters(
    classes: int, sizes: tuple[int, int], dims: int, noise: float, seed: int = 0
) -> list[np.ndarray]:
    """Return training features and labels, test features and labels of noisy cluster centres."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, dims))
    parts = []
    for size in sizes:
        labels = rng.integers(0, classes, size)
        features = centres[labels] + noise * rng.standard_normal((size, dims))
        parts += [features.astype(np.float32), labels]
    return parts


def voted(train: np.ndarray, labels: np.ndarray, query: np.ndarray, k: int) -> int:
    """Return the class of one query: exp(cosine / 0.07) votes of its k nearest neighbours."""
    cosines = [
        float(np.dot(x, query) / (np.linalg.norm(x) * np.linalg.norm(query)))
        for x in train.astype(np.float64)
    ]
    votes: dict[int, float] = defaultdict(float)
    for number in sorted(range(len(train)), key=lambda i: -cosines[i])[:k]:
        votes[int(labels[number])] += np.exp(cosines[number] / 0.07)
    return max(votes, key=lambda label: votes[label])


@pytest.mark.parametrize(("classes", "k", "noise"), [(2, 5, 4.0), (7, 20, 2.0), (4, 200, 3.0)])
def test_neighbours_vote_by_their_similarity(classes: int, k: int, noise: float) -> None:
    """By default a neighbour has exp(cosine / 0.07) votes; plain votes give other classes."""
    train, labels, test, _ = clusters(classes, (300, 100), 12, noise, seed=k)
    labels = 10 * labels + 3
    expected = [voted(train, labels, query.astype(np.float64), k) for query in test]
    np.testing.assert_array_equal(knn_predict(train, labels, test, Neighbours(k=k), CPU), expected)
    plain = knn_predict(train, labels, test, Neighbours(k=k, temperature=None), CPU)
    assert (plain != expected).any()


@pytest.mark.parametrize(
    ("classes", "k", "noise"), [(2, 1, 4.0), (2, 5, 4.0), (2, 21, 4.0), (4, 20, 0.2)]
)
def test_plain_votes_agree_with_scikit_learn(classes: int, k: int, noise: float) -> None:
    """With one vote each, classes are those of scikit-learn's cosine KNeighborsClassifier."""
    train, labels, test, test_labels = clusters(classes, (400, 1500), 12, noise, seed=k)
    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train, labels)
    got = knn_predict(train, labels, test, Neighbours(k=k, temperature=None), CPU)
    np.testing.assert_array_equal(got, oracle.predict(test))
    assert noise > 1 or (got == test_labels).all()


def test_ties_of_plain_votes_go_to_the_nearer() -> None:
    """The majority of the k neighbours wins, and the nearest neighbour's class breaks a tie."""
    angles = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    lengths = np.array([1, 9, 2, 5, 3])
    train = (lengths * np.stack([np.cos(angles), np.sin(angles)])).T.astype(np.float32)
    labels = np.array([7, 2, 2, 7, 2])
    query = np.array([[1.0, 0.0]], np.float32)

    def plain(k: int) -> list[int]:
        neighbours = Neighbours(k=k, temperature=None)
        return knn_predict(train, labels, query, neighbours, CPU).tolist()

    assert plain(4) == [7]
    assert plain(5) == [2]
    with pytest.raises(ConfigError, match=r"`k` 6: expected 1 to 5, the number of training images"):
        plain(6)


def folds_of(labels: np.ndarray) -> np.ndarray:
    """Deal the images of one class after the other out to five folds."""
    folds = np.empty(len(labels), int)
    dealt = 0
    for label in sorted(set(labels.tolist())):
        for number in np.flatnonzero(labels == label):
            folds[number] = dealt % FOLDS
            dealt += 1
    return folds


def fitted(features: np.ndarray, labels: np.ndarray, c: float, other: np.ndarray) -> np.ndarray:
    """Return the classes of `other` by a logistic regression that is fitted from zero, tightly."""
    scaler = StandardScaler().fit(features.astype(np.float64))
    model = LogisticRegression(C=c, max_iter=5000, tol=1e-6)
    model.fit(scaler.transform(features), labels)
    return np.asarray(model.predict(scaler.transform(other)))


def test_c_is_chosen_by_cross_validation_and_all_images_are_fitted() -> None:
    """C has the best accuracy in five stratified folds, and the final fit uses every image."""
    train, labels, test, _ = clusters(3, (120, 300), 12, 2.0)
    train, test = 50 * train + 7, 50 * test + 7
    folds = folds_of(labels)
    accuracy = [
        np.mean(
            np.concatenate(
                [
                    fitted(train[folds != f], labels[folds != f], c, train[folds == f])
                    == labels[folds == f]
                    for f in range(FOLDS)
                ]
            )
        )
        for c in C_GRID
    ]
    predicted, c = linear_predict(train, labels, test)
    # The path of warm-started fits ends within the solver's tolerance of these fits.
    assert accuracy[C_GRID.index(c)] >= max(accuracy) - 0.017
    assert accuracy[C_GRID.index(c)] > min(accuracy) + 0.02
    assert (predicted == fitted(train, labels, c, test)).mean() > 0.99
    np.testing.assert_array_equal(linear_predict(train, labels, test)[0], predicted)


def test_folds_are_stratified_as_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fold holds as many images of each class as StratifiedKFold gives it."""
    train, labels, _, _ = clusters(4, (123, 1), 3, 1.0)
    # StratifiedKFold numbers classes by their first image.
    labels[:4] = range(4)
    held_out: list[list[int]] = []

    class Recording(LogisticRegression):
        def fit(self, features: np.ndarray, classes: np.ndarray) -> "Recording":
            counts = np.bincount(labels) - np.bincount(classes, minlength=4)
            if C_GRID[0] == self.C and counts.any():
                held_out.append(counts.tolist())
            return super().fit(features, classes)

    monkeypatch.setattr("dtcache.metrics.probes.LogisticRegression", Recording)
    linear_predict(train, labels, train)
    theirs = [
        np.bincount(labels[test], minlength=4).tolist()
        for _, test in StratifiedKFold(FOLDS).split(train, labels)
    ]
    assert held_out == theirs


def test_features_with_more_values_than_images_are_judged_by_all_values() -> None:
    """With more values than images, the predictions are those of a fit to every value."""
    train, labels, test, _ = clusters(3, (60, 300), 200, 4.0)
    predicted, c = linear_predict(train, labels, test)
    assert (predicted == fitted(train, labels, c, test)).mean() > 0.99


def test_the_search_ends_after_four_worse_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """No C is tried beyond the fourth that is worse than the best one."""
    tried: list[float] = []

    class Recording(LogisticRegression):
        def fit(self, features: np.ndarray, classes: np.ndarray) -> "Recording":
            tried.append(self.C)
            return super().fit(features, classes)

    monkeypatch.setattr("dtcache.metrics.probes.LogisticRegression", Recording)
    train, labels, test, _ = clusters(3, (120, 10), 60, 8.0)
    c = linear_predict(train, labels, test)[1]
    last = C_GRID.index(max(tried))
    assert C_GRID.index(c) + 4 <= last < len(C_GRID) - 1


def test_of_equally_good_values_the_smallest_c_is_chosen() -> None:
    """If every C separates two classes of equal size, C is the smallest value of the grid."""
    labels = np.arange(60) % 2
    train = np.stack([labels, -labels], 1).astype(np.float32)
    predicted, c = linear_predict(train, labels, train)
    assert c == 1e-5 and at_edge(c) and at_edge(100.0) and not at_edge(0.1)
    np.testing.assert_array_equal(predicted, labels)


def test_c_is_chosen_on_the_first_five_thousand_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels beyond the first images change the final fit only, not C."""
    monkeypatch.setattr("dtcache.metrics.probes.MAX_CHOOSING", 150)
    train, labels, test, _ = clusters(3, (300, 200), 12, 2.0)
    shuffled = labels.copy()
    shuffled[150:] = np.random.default_rng(0).permutation(shuffled[150:])
    predicted, c = linear_predict(train, labels, test)
    other, other_c = linear_predict(train, shuffled, test)
    assert c == other_c
    assert (predicted != other).any()


def test_rare_classes_are_fitted_too() -> None:
    """Classes of fewer images than folds, even of one image, are no obstacle."""
    train, labels, test, test_labels = clusters(2, (40, 30), 20, 0.1)
    labels[:1] = 2
    labels[1:4] = 3
    predicted, _ = linear_predict(train, labels, test)
    assert (predicted == test_labels).mean() > 0.9


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
def test_two_images_of_two_classes_are_needed(labels: list[int]) -> None:
    """Training images of one class, or of one class and a single other image, are refused."""
    features = np.zeros((5, 2), np.float32)
    with pytest.raises(
        ImagesError,
        match=rf"two classes or more, two or more of each, got 5 images of {len(set(labels))}; "
        "pass a larger `limit_train`",
    ):
        linear_predict(features, np.array(labels), features)
