"""Decoded features of some rows; damaged samples are left out and named.

Shape suffixes: R rows, V views, C channels, H rows of a map, W columns, N coefficients.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.cache.cache import Cache
from dtcache.errors import CacheDamagedError

AT_ONCE = 1 << 22
"""Most values of one array that are decoded at a time: 16 MiB of fp32."""

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """One array's features of R rows."""

    rows: Rows
    """(R,): the rows that could be read."""
    whitened_RVCHW: Tensor
    """fp32, as stored."""
    sigma_RV: Tensor
    """fp32: raw = whitened * sigma + mu."""
    mu_RV: Tensor
    coefficients_RVN: Tensor
    """int16, or fp16 in a cache of float16 features."""
    damaged: dict[str, str]
    """By sample key: why a row was left out."""


def decode(cache: Cache, name: str, rows: Rows) -> Decoded:
    """Decode one array's features of some rows.

    Damaged rows are found by bisection, which costs nothing if there are none.
    """
    parts, damaged = _read(cache, name, rows)
    num_views = cache.reader.manifest.num_views
    if not parts:
        return Decoded(
            rows=np.zeros(0, np.int64),
            whitened_RVCHW=torch.zeros(0, num_views, *cache.shape(name)),
            sigma_RV=torch.zeros(0, num_views),
            mu_RV=torch.zeros(0, num_views),
            coefficients_RVN=torch.zeros(0, num_views, 1, dtype=torch.int16),
            damaged=damaged,
        )
    readable = np.concatenate([part_rows for part_rows, _, _ in parts])
    coefficients = torch.cat([values for _, values, _ in parts])
    scalars = torch.cat([part_scalars for _, _, part_scalars in parts])
    with torch.inference_mode():
        whitened = cache.decoder([name])({name: coefficients})[name]
    return Decoded(
        rows=readable,
        whitened_RVCHW=whitened.view(len(readable), num_views, *cache.shape(name)),
        sigma_RV=scalars[:, 0].view(-1, num_views),
        mu_RV=scalars[:, 1].view(-1, num_views),
        coefficients_RVN=coefficients.view(len(readable), num_views, -1),
        damaged=damaged,
    )


def _read(
    cache: Cache, name: str, rows: Rows
) -> tuple[list[tuple[Rows, Tensor, Tensor]], dict[str, str]]:
    """Return rows, coefficients and scalars of readable rows in parts, and the damage by key."""
    if not len(rows):
        return [], {}
    num_views = cache.reader.manifest.num_views
    try:
        values, scalars = cache.coefficients(
            np.repeat(rows, num_views), np.tile(np.arange(num_views), len(rows)), [name]
        )
        return [(rows, values[name], scalars[name])], {}
    except CacheDamagedError as error:
        if len(rows) == 1:
            return [], {cache.samples["key"][int(rows[0])].as_py(): str(error)}
    half = len(rows) // 2
    left, damaged_left = _read(cache, name, rows[:half])
    right, damaged_right = _read(cache, name, rows[half:])
    return left + right, damaged_left | damaged_right


def in_parts(cache: Cache, name: str, rows: Rows) -> Iterator[Decoded]:
    """Yield one array's features of some rows, at most `AT_ONCE` values at a time."""
    step = max(1, AT_ONCE // (cache.reader.manifest.num_views * int(np.prod(cache.shape(name)))))
    for start in range(0, len(rows), step):
        yield decode(cache, name, rows[start : start + step])
