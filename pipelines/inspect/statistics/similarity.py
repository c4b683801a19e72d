"""Similarity of taps (CKA) and k-NN accuracy per tap, both from pooled features."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from dtcache.metrics.probes import Neighbours, knn_predict
from dtcache.recipe import Json
from pipelines.inspect.statistics.jackknife import Estimate, jackknife, proportion
from pipelines.inspect.statistics.measures import cka, hsic
from pipelines.inspect.statistics.sums import Group

FOLDS = 5
NEIGHBOURS = 20
LEAST_LABELLED = 20
LEAST_BATCH = 4
"""Rows that the unbiased estimator of HSIC needs."""

Pooled = NDArray[np.float32]


def similarities(groups: Mapping[str, Sequence[Group]], sampled: float) -> Json:
    """Return linear CKA of pooled features between every two arrays.

    `value` and `half_width` are matrices in the order of `names`; an entry is None if it cannot be
    computed. A group of samples is a minibatch; rows that one array lacks are dropped from all,
    except those of an array without any.
    """
    names = list(groups)
    pooled = {
        name: of_array
        for name, of_array in groups.items()
        if any(len(group.pooled_rows) for group in of_array)
    }
    batches = _common(pooled)
    value = [[1.0 if a == b else None for b in names] for a in names]
    half_width: list[list[float | None]] = [[0.0 if a == b else None for b in names] for a in names]
    own = {name: [hsic(x, x) for x in batches[name]] for name in pooled}
    for i, a in enumerate(names):
        for j in range(i):
            b = names[j]
            if not {a, b} <= pooled.keys():
                continue
            minibatches = [
                (hsic(x, y), xx, yy)
                for x, y, xx, yy in zip(batches[a], batches[b], own[a], own[b], strict=True)
            ]
            estimate = jackknife(minibatches, cka, sampled) if minibatches else None
            if estimate is not None:
                value[i][j] = value[j][i] = estimate.value
                half_width[i][j] = half_width[j][i] = estimate.half_width
    return {"names": names, "value": value, "half_width": half_width}


def knn_accuracy(
    groups: Sequence[Group], labels: pa.ChunkedArray
) -> tuple[Estimate | None, float | None]:
    """Return k-NN accuracy in five folds, and the share of the most frequent label.

    The 20 nearest neighbours by cosine similarity of the first view's pooled features vote, as in
    `knn_predict`. Both are None if there are fewer than 20 labelled samples or fewer than two
    classes.
    """
    rows = np.concatenate([group.pooled_rows for group in groups])
    labels_R = labels.take(pa.array(rows))
    known = labels_R.is_valid().to_numpy()
    # Numbered anew: a label may be any 32-bit number, and votes are counted by number.
    names, classes = np.unique(labels_R.filter(pa.array(known)).to_numpy(), return_inverse=True)
    if len(classes) < LEAST_LABELLED or len(names) < 2:
        return None, None
    pooled = np.concatenate([group.pooled_RC for group in groups if len(group.pooled_rows)])[known]
    fold = np.random.default_rng(0).permutation(len(classes)) % FOLDS
    hits = 0
    for number in range(FOLDS):
        train = fold != number
        test = fold == number
        neighbours = Neighbours(k=min(NEIGHBOURS, int(train.sum())))
        predicted = knn_predict(
            pooled[train], classes[train], pooled[test], neighbours, torch.device("cpu")
        )
        hits += int((predicted == classes[test]).sum())
    return proportion(hits, len(classes)), float(np.bincount(classes).max() / len(classes))


def _common(groups: Mapping[str, Sequence[Group]]) -> dict[str, list[NDArray[np.float64]]]:
    """Return pooled features by array and group, of the rows that every array has.

    Groups of fewer than `LEAST_BATCH` common rows are dropped.
    """
    batches: dict[str, list[NDArray[np.float64]]] = {name: [] for name in groups}
    for aligned in zip(*groups.values(), strict=True):
        rows = aligned[0].pooled_rows
        for group in aligned[1:]:
            rows = np.intersect1d(rows, group.pooled_rows)
        if len(rows) < LEAST_BATCH:
            continue
        for name, group in zip(groups, aligned, strict=True):
            batches[name].append(
                group.pooled_RC[np.isin(group.pooled_rows, rows)].astype(np.float64)
            )
    return batches
