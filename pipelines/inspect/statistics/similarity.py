"""What pooled features say: how alike taps are, and which of them carries the labels."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from dtcache.metrics.probes import knn_predict
from dtcache.recipe import Json
from pipelines.inspect.statistics.jackknife import Estimate, jackknife, proportion
from pipelines.inspect.statistics.measures import cka, hsic
from pipelines.inspect.statistics.sums import Group

FOLDS = 5
NEIGHBOURS = 20
LEAST_LABELLED = 20
LEAST_BATCH = 4
"""Rows that the unbiased estimate of HSIC needs."""

Pooled = NDArray[np.float32]


def similarities(groups: Mapping[str, Sequence[Group]], sampled: float) -> Json:
    """Return linear CKA of pooled features between every two arrays: `names`, `value` and `half_width` as matrices.

    A group of samples is a minibatch; rows that one of the arrays lacks are left out of all.
    """
    names = list(groups)
    batches = _common(groups)
    value = [[1.0 if a == b else None for b in names] for a in names]
    half: list[list[float | None]] = [[0.0 if a == b else None for b in names] for a in names]
    own = {name: [hsic(x, x) for x in batches[name]] for name in names}
    for i, a in enumerate(names):
        for j in range(i):
            b = names[j]
            parts = [
                (hsic(x, y), xx, yy)
                for x, y, xx, yy in zip(batches[a], batches[b], own[a], own[b], strict=True)
            ]
            found = jackknife(parts, cka, sampled) if parts else None
            if found is not None:
                value[i][j] = value[j][i] = found.value
                half[i][j] = half[j][i] = found.half_width
    return {"names": names, "value": value, "half_width": half}


def knn_accuracy(
    groups: Sequence[Group], labels: pa.ChunkedArray
) -> tuple[Estimate | None, float | None]:
    """Return the share of samples whose label their nearest neighbours tell, and that of the most frequent label.

    Pooled features of the first view, cosine, majority of 20, in five folds. None where there are no labels of two or
    more classes, or too few samples.
    """
    rows = np.concatenate([group.pooled_rows for group in groups])
    found = labels.take(pa.array(rows))
    known = found.is_valid().to_numpy()
    classes = found.filter(pa.array(known)).to_numpy().astype(np.int64)
    if len(classes) < LEAST_LABELLED or len(np.unique(classes)) < 2:
        return None, None
    pooled = np.concatenate([group.pooled_RC for group in groups if len(group.pooled_rows)])[known]
    fold = np.random.default_rng(0).permutation(len(classes)) % FOLDS
    hits = 0
    for number in range(FOLDS):
        train = fold != number
        test = fold == number
        k = min(NEIGHBOURS, int(train.sum()))
        told = knn_predict(pooled[train], classes[train], pooled[test], k, torch.device("cpu"))
        hits += int((told == classes[test]).sum())
    return proportion(hits, len(classes)), float(np.bincount(classes).max() / len(classes))


def _common(groups: Mapping[str, Sequence[Group]]) -> dict[str, list[NDArray[np.float64]]]:
    """Return pooled features by array, group by group, of the rows that every array has; too small groups are left."""
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
