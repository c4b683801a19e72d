"""Two probes of frozen features: k nearest neighbours and a linear classifier.

N training images, M test images, D values per feature.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from dtcache.errors import ConfigError, ImagesError

TEMPERATURE = 0.07
"""Temperature of the votes of k-NN (Wu et al. 2018, eq. 15; DINO, Caron et al. 2021)."""
C_GRID = tuple(float(f"{10 ** (exponent / 2):.6g}") for exponent in range(-10, 5))
"""Candidate inverse strengths of the linear probe's L2 penalty: 1e-5 to 100 in half decades."""
FOLDS = 5
"""Folds of the cross-validation that chooses C."""
MAX_CHOOSING = 5000
"""Most training images of the cross-validation."""
PATIENCE = 4
"""The search for C ends after this many candidates (two decades) that are worse than the best.

Without it, the fits of the largest candidates take a quarter of the search's time.
"""
MAX_ITERATIONS = 1000
TOLERANCE = 1e-3
"""Tolerance of the solver.

A tenth of it changes the accuracy on 10,000 images by at most 0.1 points and takes two to three
times the iterations.
"""
CHOOSING_TOLERANCE = 3e-3
"""Tolerance of the solver in the cross-validation.

It takes half the time of 1e-3. On 1,500 CIFAR-10 images (pixels and a random ResNet-10t, at two
sizes each), C stays the same or moves by half a decade, within the noise of the folds; 1e-2 moves
it by a decade.
"""
BLOCK = 1024
"""Test images whose similarities to all training images are in memory at the same time."""

Features = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """How the nearest training images vote."""

    k: int
    """Number of neighbours."""
    temperature: float | None = TEMPERATURE
    """A neighbour of cosine similarity s has exp(s / temperature) votes; None: one vote."""


def knn_predict(
    train_ND: Features,
    labels_N: Labels,
    test_MD: Features,
    neighbours: Neighbours,
    device: torch.device,
) -> Labels:
    """Return the class of each test image (M,): the one with most votes of its nearest neighbours.

    Similarity is the cosine. By default a neighbour has exp(similarity / 0.07) votes (Wu et al.
    2018, eq. 15; DINO). Of classes with equally many votes, the one with the nearest neighbour
    wins. Raises ConfigError if there are more neighbours than training images.
    """
    k = neighbours.k
    if not 1 <= k <= len(train_ND):
        raise ConfigError(f"`k` {k}: expected 1 to {len(train_ND)}, the number of training images")
    train_DN = F.normalize(torch.from_numpy(train_ND).to(device), dim=1).T
    classes, positions_N = np.unique(labels_N, return_inverse=True)
    predicted = []
    for start in range(0, len(test_MD), BLOCK):
        test_BD = F.normalize(torch.from_numpy(test_MD[start : start + BLOCK]).to(device), dim=1)
        similarities_BK, nearest_BK = (test_BD @ train_DN).topk(k, dim=1, sorted=True)
        votes_BK = np.ones(nearest_BK.shape)
        if neighbours.temperature is not None:
            votes_BK = np.exp(similarities_BK.double().cpu().numpy() / neighbours.temperature)
        class_BK = positions_N[nearest_BK.cpu().numpy()]
        row_B1 = np.arange(len(class_BK))[:, None]
        total_BC = np.zeros((len(class_BK), len(classes)))
        np.add.at(total_BC, (row_B1, class_BK), votes_BK)
        # argmax takes the first, hence nearest, neighbour of a class with most votes.
        winner_B = total_BC[row_B1, class_BK].argmax(1)
        predicted.append(classes[class_BK[row_B1[:, 0], winner_B]])
    return np.concatenate(predicted)


def linear_predict(train_ND: Features, labels_N: Labels, test_MD: Features) -> tuple[Labels, float]:
    """Return the class of each test image (M,) by logistic regression, and the chosen C.

    The probe minimises mean cross-entropy + |W|^2 / (2 C n) on n standardised features. C is the
    value of C_GRID with the best accuracy in a stratified five-fold cross-validation on the first
    5,000 training images, which must be in random order; of equally good values, the smallest. The
    search goes upwards and ends after four candidates that are worse than the best. The probe is
    then fitted on all training images. Raises ImagesError unless two of the classes have two images
    or more.
    """
    inputs_ND, test_inputs_MD = _probe_inputs(train_ND, test_MD)
    c = _best_c(inputs_ND[:MAX_CHOOSING], labels_N[:MAX_CHOOSING])
    probe = _probe(TOLERANCE).set_params(C=c).fit(inputs_ND, labels_N)
    predicted: Labels = probe.predict(test_inputs_MD)
    return predicted, c


def at_edge(c: float) -> bool:
    """Return whether C is the smallest or the largest candidate, so that a better one may exist."""
    return c in (C_GRID[0], C_GRID[-1])


def _best_c(inputs_ND: Features, labels_N: Labels) -> float:
    _, counts = np.unique(labels_N, return_counts=True)
    if (counts > 1).sum() < 2:
        raise ImagesError(
            "the linear probe needs training images of two classes or more, two or more of each, "
            f"got {len(labels_N)} images of {len(counts)}; pass a larger `limit_train` or other "
            "`train` images"
        )
    # Dealing the images out class by class stratifies the folds as StratifiedKFold does, which
    # refuses classes with fewer images than folds.
    fold_N = np.empty(len(labels_N), np.int64)
    fold_N[np.argsort(labels_N, kind="stable")] = np.arange(len(labels_N)) % FOLDS
    probes = [(fold_N == fold, _probe(CHOOSING_TOLERANCE)) for fold in np.unique(fold_N)]

    def hits(c: float, held_out_N: NDArray[np.bool_], probe: LogisticRegression) -> int:
        probe.set_params(C=c).fit(inputs_ND[~held_out_N], labels_N[~held_out_N])
        return int((probe.predict(inputs_ND[held_out_N]) == labels_N[held_out_N]).sum())

    best_c, most_hits, worse = C_GRID[0], -1, 0
    # One thread per fold: the solver's products are so small that BLAS's own threads mostly spin.
    threads = min(FOLDS, torch.get_num_threads())
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        for c in C_GRID:
            total = sum(pool.map(partial(hits, c), *zip(*probes, strict=True)))
            if total > most_hits:
                best_c, most_hits, worse = c, total, 0
            # Equally good does not count: with the smallest candidates, the commonest class wins.
            worse += total < most_hits
            if worse == PATIENCE:
                break
    return best_c


def _probe_inputs(train_ND: Features, test_MD: Features) -> tuple[Features, Features]:
    """Return both sets, standardised by the training set, with min(N, D) values per image.

    If D > N, both are given in an orthonormal basis of the training images' span. The penalised
    optimum lies in that span, so the probe's predictions are those of all D values, for less time.
    """
    scaler = StandardScaler().fit(train_ND)
    inputs_ND = scaler.transform(train_ND)
    test_inputs_MD = scaler.transform(test_MD)
    if len(inputs_ND) >= inputs_ND.shape[1]:
        return inputs_ND, test_inputs_MD
    basis_DN = torch.linalg.qr(torch.from_numpy(inputs_ND).T).Q.numpy()
    return inputs_ND @ basis_DN, test_inputs_MD @ basis_DN


def _probe(tolerance: float) -> LogisticRegression:
    """Return a probe whose fits start at the weights of its previous fit."""
    return LogisticRegression(
        solver="lbfgs", max_iter=MAX_ITERATIONS, tol=tolerance, warm_start=True
    )
