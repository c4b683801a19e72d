"""The galleries of a cache's page: features, segments, originals beside decoded maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtcache.cache.cache import Cache
from dtcache.errors import CacheDamagedError, ConfigError
from pipelines.inspect.page.pictures import (
    PALETTE,
    ColourBasis,
    colour_basis,
    map_uri,
    photo_uri,
    segments,
)
from pipelines.inspect.statistics.decode import Rows, decode
from pipelines.inspect.statistics.limits import rows_at_once
from pipelines.inspect.statistics.remeasure import Remeasured

BASIS_ROWS = 64
"""Images that colours and clusters are fitted on."""
WORST = 6
"""Samples with the largest codec error that the page shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One picture of the page."""

    uri: str
    alt: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryRow:
    """An image and the pictures beside it."""

    key: str
    note: str
    photo: Picture | None
    """None if the image is not available."""
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Rows of pictures under common headings."""

    headings: tuple[str, ...]
    rows: tuple[GalleryRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Galleries:
    """The galleries of a cache; features and segments are None if no image can be read."""

    features: Gallery | None = None
    segments: Gallery | None = None
    worst: Gallery | None = None
    """None unless the codec's errors were remeasured."""


def galleries(cache: Cache, rows: Rows, count: int, remeasured: Remeasured | None) -> Galleries:
    """Return features as colours, segments, and the worst reconstructions.

    `rows` are the candidates in random order; the remeasured rows come first. An image is shown if
    its features can be read at every tap.
    """
    if remeasured is not None:
        rows = np.concatenate([remeasured.rows, rows[~np.isin(rows, remeasured.rows)]])
    shown, pools = _shown(cache, rows, count)
    if not len(shown):
        return Galleries()
    bases = {name: colour_basis(maps) for name, maps in pools.items()}
    clusters = {name: segments(maps) for name, maps in pools.items()}
    photos = photos_of(cache, shown)
    feature_rows = []
    segment_rows = []
    for index, (row, photo) in enumerate(zip(shown.tolist(), photos, strict=True)):
        key = cache.samples["key"][row].as_py()
        note = class_name(cache, row)
        colours = []
        regions = []
        for name in cache.names:
            original = _original(remeasured, name, row)
            if original is not None:
                uri = map_uri(bases[name].colours(original))
                colours.append(Picture(uri=uri, alt=f"{name} of {key}, original"))
            uri = map_uri(bases[name].colours(pools[name][index]))
            colours.append(Picture(uri=uri, alt=f"{name} of {key}"))
            uri = map_uri(PALETTE[clusters[name][index]])
            regions.append(Picture(uri=uri, alt=f"segments of {name} of {key}"))
        feature_rows.append(GalleryRow(key=key, note=note, photo=photo, pictures=tuple(colours)))
        segment_rows.append(GalleryRow(key=key, note=note, photo=photo, pictures=tuple(regions)))
    has_originals = remeasured is not None and bool(len(remeasured.rows))
    return Galleries(
        features=Gallery(headings=_headings(cache.names, has_originals), rows=tuple(feature_rows)),
        segments=Gallery(headings=tuple(cache.names), rows=tuple(segment_rows)),
        worst=_worst(cache, bases, remeasured) if remeasured is not None else None,
    )


def _shown(cache: Cache, rows: Rows, count: int) -> tuple[Rows, dict[str, NDArray[np.float32]]]:
    """Return the rows to show and, by array, their maps followed by those of more images.

    There are fewer rows, or none, if their maps would take too much memory.
    """
    room = rows_at_once(cache)
    count = min(count, room)
    pool = rows[: max(count, min(BASIS_ROWS, room))]
    by_array = {}
    for name in cache.names:
        by_array[name] = decode(cache, name, pool)
        pool = pool[np.isin(pool, by_array[name].rows)]
    maps = {
        name: decoded.whitened_RVCHW[np.isin(decoded.rows, pool), 0].numpy()
        for name, decoded in by_array.items()
    }
    return pool[:count], maps


def photos_of(cache: Cache, rows: Rows) -> list[Picture | None]:
    """Return the images of some rows.

    An image is None if it is damaged, or if the cache stores none and their source was not given.
    """
    photos: list[Picture | None] = []
    for row in rows.tolist():
        try:
            uri = photo_uri(cache.images([row])[0])
            photos.append(Picture(uri=uri, alt=cache.samples["key"][row].as_py()))
        except (ConfigError, CacheDamagedError):
            photos.append(None)
    return photos


def class_name(cache: Cache, row: int) -> str:
    """Return the name of a row's class, empty if the row has no label."""
    label = cache.samples["label"][row].as_py()
    classes = cache.reader.manifest.classes
    if label is None:
        return ""
    return classes[label] if classes is not None and 0 <= label < len(classes) else f"class {label}"


def _original(remeasured: Remeasured | None, name: str, row: int) -> NDArray[np.float32] | None:
    """Return the teacher's own map of a row, or None if it was not computed."""
    if remeasured is None:
        return None
    index = np.flatnonzero(remeasured.rows == row)
    return remeasured.originals[name][index[0]].astype(np.float32) if len(index) else None


def _headings(names: Sequence[str], with_originals: bool) -> tuple[str, ...]:
    if not with_originals:
        return tuple(names)
    return tuple(f"{name} {kind}" for name in names for kind in ("original", "decoded"))


def _worst(cache: Cache, bases: Mapping[str, ColourBasis], remeasured: Remeasured) -> Gallery:
    """Return the samples with the largest errors: original beside decoded map, the error below."""
    worst = remeasured.worst()[:WORST]
    rows = remeasured.rows[worst]
    decoded = {name: decode(cache, name, rows) for name in cache.names}
    photos = photos_of(cache, rows)
    gallery_rows = []
    for number, (index, photo) in enumerate(zip(worst, photos, strict=True)):
        pictures = []
        for name in cache.names:
            alt = f"{name} of {remeasured.keys[index]}"
            original = remeasured.originals[name][index].astype(np.float32)
            uri = map_uri(bases[name].colours(original))
            pictures.append(Picture(uri=uri, alt=f"{alt}, original"))
            uri = map_uri(bases[name].colours(decoded[name].whitened_RVCHW[number, 0].numpy()))
            error = f"error {remeasured.errors[name][index]:.2f}"
            pictures.append(Picture(uri=uri, alt=f"{alt}, decoded", note=error))
        gallery_rows.append(
            GalleryRow(
                key=remeasured.keys[index],
                note=class_name(cache, int(rows[number])),
                photo=photo,
                pictures=tuple(pictures),
            )
        )
    return Gallery(headings=_headings(cache.names, True), rows=tuple(gallery_rows))
