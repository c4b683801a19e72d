"""Decoded features of some rows, where what is damaged is left out and named."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.cache.cache import Cache
from dtcache.errors import CacheDamagedError

AT_ONCE = 1 << 22
"""Most values of one array that are decoded at a time, 16 MiB of fp32."""

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """One array's features of R rows."""

    rows: Rows
    """(R,): those that could be read."""
    whitened_RVCHW: Tensor
    """fp32, as stored."""
    sigma_RV: Tensor
    """fp32: raw = whitened * sigma + mu."""
    mu_RV: Tensor
    coefficients_RVN: Tensor
    """int16, or fp16 where features are stored so."""
    damaged: dict[str, str]
    """What is wrong by sample key, of the rows that were left out."""


@functools.lru_cache(maxsize=4)
def opened(root: str, identity: str) -> Cache:
    """Open a cache once a process, whole or not; `identity` tells it from what is there after more was written."""
    return Cache(Path(root), allow="damage")


def decode(cache: Cache, name: str, rows: Rows) -> Decoded:
    """Decode one array's features of some rows; damaged ones are found by halving, at no cost where there is none."""
    parts, damaged = _read(cache, name, rows)
    views = cache.reader.manifest.num_views
    whole = np.concatenate([part for part, _, _ in parts]) if parts else np.zeros(0, np.int64)
    if not parts:
        return Decoded(
            rows=whole,
            whitened_RVCHW=torch.zeros(0, views, *cache.shape(name)),
            sigma_RV=torch.zeros(0, views),
            mu_RV=torch.zeros(0, views),
            coefficients_RVN=torch.zeros(0, views, 1, dtype=torch.int16),
            damaged=damaged,
        )
    values = torch.cat([part[1] for part in parts])
    scalars = torch.cat([part[2] for part in parts])
    with torch.inference_mode():
        whitened = cache.decoder([name])({name: values})[name]
    return Decoded(
        rows=whole,
        whitened_RVCHW=whitened.view(len(whole), views, *cache.shape(name)),
        sigma_RV=scalars[:, 0].view(-1, views),
        mu_RV=scalars[:, 1].view(-1, views),
        coefficients_RVN=values.view(len(whole), views, -1),
        damaged=damaged,
    )


def _read(
    cache: Cache, name: str, rows: Rows
) -> tuple[list[tuple[Rows, Tensor, Tensor]], dict[str, str]]:
    """Return coefficients and scalars of all views of the rows that can be read, in parts, and what is wrong else."""
    if not len(rows):
        return [], {}
    views = cache.reader.manifest.num_views
    try:
        values, scalars = cache.coefficients(
            np.repeat(rows, views), np.tile(np.arange(views), len(rows)), [name]
        )
        return [(rows, values[name], scalars[name])], {}
    except CacheDamagedError as error:
        if len(rows) == 1:
            return [], {cache.samples["key"][int(rows[0])].as_py(): str(error)}
    half = len(rows) // 2
    (left, wrong_left), (right, wrong_right) = (
        _read(cache, name, part) for part in (rows[:half], rows[half:])
    )
    return left + right, wrong_left | wrong_right


def in_parts(cache: Cache, name: str, rows: Rows) -> Iterator[Decoded]:
    """Yield one array's features of rows, as many at a time as memory is given for."""
    step = max(1, AT_ONCE // (cache.reader.manifest.num_views * int(np.prod(cache.shape(name)))))
    for start in range(0, len(rows), step):
        yield decode(cache, name, rows[start : start + step])
