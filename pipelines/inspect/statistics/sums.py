"""Sums over a group of samples of one tap; statistics follow from them, so a map is decoded once.

Shape suffixes: R rows, V views, C channels, H rows of a map, W columns, N coefficients, B maps, M
positions of all maps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import dask.array as da
import numpy as np
import torch
from dask.delayed import delayed
from numpy.typing import NDArray
from torch import Tensor

from dtcache.cache.cache import Cache
from dtcache.codec.pca_dct import dct_matrix
from pipelines.inspect.statistics.decode import Decoded, Rows, in_parts
from pipelines.inspect.statistics.limits import Limits

EDGES = np.linspace(-6.0, 6.0, 97)
"""Edges of the histogram of whitened values; values beyond them count in the outermost bins."""
POOLED_ROWS = 500
"""Most rows per group whose pooled features are kept for CKA and k-NN."""
EXACT_AT_ONCE = 1 << 20
"""Most values that are held in fp64 at a time."""

Float = NDArray[np.float64]


@dataclass(kw_only=True, slots=True)
class GroupSums:
    """Additive sums: the sums of two groups add up to the sums of their union."""

    rows: int
    maps: int
    """Rows x views."""
    values: int
    """Whitened values."""
    whitened_C: Float
    """Sum of whitened values over rows, views and positions."""
    products_CC: Float
    """Sum of the outer products of whitened values at each position."""
    raw: float
    """Sum of the raw values, in the teacher's scale."""
    raw_square: float
    histogram: NDArray[np.int64]
    rings: Float
    """(max(H, W),): squared DCT coefficients about the codec's mean, summed by ring."""
    coded: int
    saturated: int
    """Coded values at the limit of their type."""
    escaped: int
    """Coded values outside their variance class's symbol table."""
    between_draws: Float
    """(2,): squared deviations of draws from their mean per row, scaled to the noise in all maps;
    and the sum of squared whitened values. Zeros if there is one draw."""


@dataclass(kw_only=True, slots=True)
class Group:
    """One group of rows: its sums, its pooled features, and the rows that could not be read."""

    sums: GroupSums
    pooled_rows: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    pooled_RC: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """Spatial means of the first view, whitened."""
    damaged: dict[str, str] = field(default_factory=dict)
    """By sample key: why a row was left out."""


def add(groups: Sequence[GroupSums]) -> GroupSums:
    """Return the sums over all groups."""
    return GroupSums(**{f.name: sum(getattr(g, f.name) for g in groups) for f in fields(GroupSums)})


def group_sums(cache: Cache, name: str, row_groups: Sequence[Rows], limits: Limits) -> list[Group]:
    """Return the sums of each group of rows of an array, from the configured Dask scheduler."""
    row_numbers = da.from_array(
        np.concatenate(row_groups), chunks=(tuple(len(rows) for rows in row_groups),)
    )
    groups = row_numbers.map_blocks(
        _block,
        # The cache is a task of its own: each process opens the cache once, not once per block.
        cache=delayed(cache, traverse=False),
        tap=name,
        pooled_rows=limits.pooled_rows,
        dtype=object,
        chunks=((1,) * len(row_groups),),
        meta=np.empty(0, object),
    )
    return list(groups.compute(num_workers=limits.threads(cache, name)))


def _block(row_numbers: Rows, cache: Cache, tap: str, pooled_rows: int) -> NDArray[np.object_]:
    block = np.empty(1, object)
    block[0] = group_of(cache, tap, row_numbers, pooled_rows)
    return block


def group_of(cache: Cache, name: str, rows: Rows, pooled_rows: int = POOLED_ROWS) -> Group:
    """Return the sums of one group of rows, and the pooled features of its first rows."""
    group = Group(sums=empty(cache.shape(name)))
    pooled: list[NDArray[np.float32]] = []
    kept: list[Rows] = []
    for decoded in in_parts(cache, name, rows):
        group.damaged |= decoded.damaged
        if not len(decoded.rows):
            continue
        group.sums = add([group.sums, _sums_of(cache, name, decoded)])
        room = pooled_rows - sum(len(rows) for rows in kept)
        kept.append(decoded.rows[:room])
        pooled.append(decoded.whitened_RVCHW[:room, 0].mean((2, 3)).numpy())
    if kept:
        group.pooled_rows = np.concatenate(kept)
        group.pooled_RC = np.concatenate(pooled)
    return group


def empty(shape: tuple[int, int, int]) -> GroupSums:
    """Return the sums of no maps (C, H, W)."""
    channels, height, width = shape
    return GroupSums(
        rows=0,
        maps=0,
        values=0,
        whitened_C=np.zeros(channels),
        products_CC=np.zeros((channels, channels)),
        raw=0.0,
        raw_square=0.0,
        histogram=np.zeros(len(EDGES) - 1, np.int64),
        rings=np.zeros(max(height, width)),
        coded=0,
        saturated=0,
        escaped=0,
        between_draws=np.zeros(2),
    )


def rings_of(height: int, width: int) -> NDArray[np.int64]:
    """Return (H, W): the ring of each DCT coefficient, 0 for the mean.

    The ring is the larger of the vertical and horizontal shares of the Nyquist frequency.
    """
    rings = max(height, width)
    y = np.arange(height)[:, None] * rings / height
    x = np.arange(width)[None] * rings / width
    return np.minimum(np.floor(np.maximum(y, x)).astype(np.int64), rings - 1)


@torch.inference_mode()
def _sums_of(cache: Cache, name: str, decoded: Decoded) -> GroupSums:
    fit = cache.fit[name]
    maps_BCHW = decoded.whitened_RVCHW.flatten(0, 1)
    channels, height, width = fit.shape
    sigma_B = decoded.sigma_RV.flatten().double()
    mu_B = decoded.mu_RV.flatten().double()
    size = channels * height * width
    sum_B = torch.zeros(len(maps_BCHW), dtype=torch.float64)
    square_B = torch.zeros_like(sum_B)
    whitened_C = torch.zeros(channels, dtype=torch.float64)
    spectrum_HW = torch.zeros(height, width, dtype=torch.float64)
    histogram = np.zeros(len(EDGES) - 1, np.int64)
    rows_HH = dct_matrix(height).float()
    columns_WW = dct_matrix(width).float()
    mean_C11 = torch.from_numpy(fit.mean).float()[:, None, None]
    # A copy of the maps in fp64 would take twice their memory: a part of the channels at a time.
    step = max(1, EXACT_AT_ONCE // (len(maps_BCHW) * height * width))
    for start in range(0, channels, step):
        part_BCHW = maps_BCHW[:, start : start + step]
        exact_BCHW = part_BCHW.double()
        sum_B += exact_BCHW.sum((1, 2, 3))
        square_B += exact_BCHW.square().sum((1, 2, 3))
        whitened_C[start : start + step] = exact_BCHW.sum((0, 2, 3))
        centred_BCHW = part_BCHW - mean_C11[start : start + step]
        spectrum_HW += (rows_HH @ centred_BCHW @ columns_WW.T).double().square().sum((0, 1))
        clipped = part_BCHW.numpy().clip(EDGES[0], EDGES[-1])
        histogram += np.histogram(clipped, EDGES)[0]
    ring_HW = rings_of(height, width)
    saturated, escaped = fit.count_limits(decoded.coefficients_RVN.numpy())
    return GroupSums(
        rows=len(decoded.rows),
        maps=len(maps_BCHW),
        values=maps_BCHW.numel(),
        whitened_C=whitened_C.numpy(),
        products_CC=_products(maps_BCHW),
        raw=float((sum_B * sigma_B + size * mu_B).sum()),
        raw_square=float(
            (square_B * sigma_B**2 + 2 * sigma_B * mu_B * sum_B + size * mu_B**2).sum()
        ),
        histogram=histogram,
        rings=np.asarray(
            np.bincount(ring_HW.ravel(), spectrum_HW.numpy().ravel(), max(height, width)),
            np.float64,
        ),
        coded=decoded.coefficients_RVN.numel(),
        saturated=saturated,
        escaped=escaped,
        between_draws=_between_draws(cache, decoded),
    )


def _products(maps_BCHW: Tensor) -> Float:
    """Return (C, C): the outer products of the channels, summed over maps and positions."""
    channels = maps_BCHW.shape[1]
    products_CC = torch.zeros(channels, channels, dtype=torch.float64)
    step = max(1, EXACT_AT_ONCE // channels)
    for map_CHW in maps_BCHW:
        for part_CM in map_CHW.flatten(1).split(step, 1):
            exact_CM = part_CM.double()
            products_CC.addmm_(exact_CM, exact_CM.T)
    return products_CC.numpy()


def _between_draws(cache: Cache, decoded: Decoded) -> Float:
    """Return the noise between draws and the sum of squares, zeros if there is one draw."""
    manifest = cache.reader.manifest
    flips = 2 if manifest.recipe["flips"] else 1
    draws = manifest.num_views // flips
    if draws < 2:
        return np.zeros(2)
    noise = 0.0
    squares = 0.0
    height, width = decoded.whitened_RVCHW.shape[3:]
    step = max(1, EXACT_AT_ONCE // (len(decoded.rows) * manifest.num_views * height * width))
    for part in decoded.whitened_RVCHW.split(step, 2):
        by_draw = part.unflatten(1, (draws, flips)).double()
        noise += float((by_draw - by_draw.mean(1, keepdim=True)).square().sum()) / (draws - 1)
        squares += float(by_draw.square().sum())
    # `noise` sums one variance per row and flip; there are `draws` maps for each of them.
    return np.array([noise * draws, squares])


def water_lines(
    cache: Cache, name: str
) -> tuple[list[float | None], list[float | None], float | None]:
    """Return the variance below which the quantiser hides coefficients: by ring, component, all.

    A level is the error of a uniform quantiser, step^2 / 12, averaged over the coded coefficients;
    it is None if no coefficient is coded. It is the level of reverse water-filling (Cover and
    Thomas, Elements of Information Theory, 10.3.3). The lists are empty for features stored without
    a transform.
    """
    bands = cache.fit[name].bands()
    if bands is None:
        return [], [], None
    level_KHW = bands.step_KHW**2 / 12
    ring_HW = rings_of(*level_KHW.shape[1:])
    rings = [_mean(level_KHW[:, ring_HW == ring]) for ring in range(int(ring_HW.max()) + 1)]
    components = [_mean(level_HW) for level_HW in level_KHW]
    return rings, components, _mean(level_KHW)


def _mean(values: NDArray[np.floating]) -> float | None:
    """Return the mean of the finite values, or None if there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None
