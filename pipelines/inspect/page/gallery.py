"""The pictures of a page: images beside their features, segments, originals beside decoded ones."""

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
from pipelines.inspect.statistics.decode import AT_ONCE, Rows, decode
from pipelines.inspect.statistics.remeasure import Afresh

BASIS_ROWS = 64
"""Images that colours and clusters are fitted on."""
WORST = 6


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
    """None where the image is not at hand."""
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Rows of pictures under common headings."""

    headings: tuple[str, ...]
    rows: tuple[GalleryRow, ...]


def galleries(
    cache: Cache, rows: Rows, count: int, afresh: Afresh | None
) -> tuple[Gallery, Gallery, Gallery | None] | tuple[None, None, None]:
    """Return features as colours, as segments, and the worst reconstructions, which only `afresh` knows.

    `rows` are those to choose from, in random order; where there is an `afresh`, its rows come first. None where no
    image can be read at every tap.
    """
    if afresh is not None:
        rows = np.concatenate([afresh.rows, rows[~np.isin(rows, afresh.rows)]])
    shown, pools = _shown(cache, rows, count)
    if not len(shown):
        return None, None, None
    bases = {name: colour_basis(maps) for name, maps in pools.items()}
    photos = photos_of(cache, shown)
    keys = [cache.samples["key"][int(row)].as_py() for row in shown]
    names = [class_name(cache, int(row)) for row in shown]
    colours = []
    clusters = {name: segments(maps) for name, maps in pools.items()}
    segmented = []
    for place, (row, key) in enumerate(zip(shown.tolist(), keys, strict=True)):
        pictures = []
        for name in cache.names:
            original = _original(afresh, name, row)
            if original is not None:
                uri = map_uri(bases[name].colours(original))
                pictures.append(Picture(uri=uri, alt=f"{name} of {key}, original"))
            pictures.append(
                Picture(
                    uri=map_uri(bases[name].colours(pools[name][place])), alt=f"{name} of {key}"
                )
            )
        colours.append(
            GalleryRow(key=key, note=names[place], photo=photos[place], pictures=tuple(pictures))
        )
        maps = [
            Picture(uri=map_uri(PALETTE[clusters[name][place]]), alt=f"segments of {name} of {key}")
            for name in cache.names
        ]
        segmented.append(
            GalleryRow(key=key, note=names[place], photo=photos[place], pictures=tuple(maps))
        )
    return (
        Gallery(
            headings=_headings(cache.names, afresh is not None and bool(len(afresh.rows))),
            rows=tuple(colours),
        ),
        Gallery(headings=tuple(cache.names), rows=tuple(segmented)),
        _worst(cache, bases, afresh) if afresh is not None else None,
    )


def _shown(cache: Cache, rows: Rows, count: int) -> tuple[Rows, dict[str, NDArray[np.float32]]]:
    """Return the rows to show, and by array the maps of these and of more images: those that can be read."""
    values = (
        max(int(np.prod(cache.shape(name))) for name in cache.names)
        * cache.reader.manifest.num_views
    )
    pool = rows[: max(count, min(BASIS_ROWS, 8 * AT_ONCE // values))]
    found = {}
    for name in cache.names:
        decoded = decode(cache, name, pool)
        pool = pool[np.isin(pool, decoded.rows)]
        found[name] = decoded
    maps = {name: d.whitened_RVCHW[np.isin(d.rows, pool), 0].numpy() for name, d in found.items()}
    return pool[:count], maps


def photos_of(cache: Cache, rows: Rows) -> list[Picture | None]:
    """Return the images, None where the cache stores none and their source was not given, or where one is damaged."""
    found: list[Picture | None] = []
    for row in rows.tolist():
        try:
            found.append(
                Picture(
                    uri=photo_uri(cache.images([row])[0]), alt=cache.samples["key"][row].as_py()
                )
            )
        except (ConfigError, CacheDamagedError):
            found.append(None)
    return found


def class_name(cache: Cache, row: int) -> str:
    """Return the name of a row's class, empty where it has no label."""
    label = cache.samples["label"][row].as_py()
    classes = cache.reader.manifest.classes
    if label is None:
        return ""
    return classes[label] if classes is not None and 0 <= label < len(classes) else f"class {label}"


def _original(afresh: Afresh | None, name: str, row: int) -> NDArray[np.float32] | None:
    if afresh is None:
        return None
    place = np.flatnonzero(afresh.rows == row)
    return afresh.originals[name][place[0]].astype(np.float32) if len(place) else None


def _headings(names: Sequence[str], both: bool) -> tuple[str, ...]:
    return tuple(
        h for name in names for h in ((f"{name} original", f"{name} decoded") if both else (name,))
    )


def _worst(cache: Cache, bases: Mapping[str, ColourBasis], afresh: Afresh) -> Gallery:
    """Return the samples that the codec met worst, original beside decoded, with the error below."""
    places = afresh.worst()[:WORST]
    rows = afresh.rows[places]
    decoded = {name: decode(cache, name, rows) for name in cache.names}
    photos = photos_of(cache, rows)
    found = []
    for number, (place, photo) in enumerate(zip(places, photos, strict=True)):
        pictures = []
        for name in cache.names:
            error = f"error {afresh.errors[name][place]:.2f}"
            maps = (
                afresh.originals[name][place].astype(np.float32),
                decoded[name].whitened_RVCHW[number, 0].numpy(),
            )
            for what, note, map_CHW in zip(("original", "decoded"), ("", error), maps, strict=True):
                alt = f"{name} of {afresh.keys[place]}, {what}"
                pictures.append(
                    Picture(uri=map_uri(bases[name].colours(map_CHW)), alt=alt, note=note)
                )
        note = class_name(cache, int(rows[number]))
        found.append(
            GalleryRow(key=afresh.keys[place], note=note, photo=photo, pictures=tuple(pictures))
        )
    return Gallery(headings=_headings(cache.names, True), rows=tuple(found))
