"""Which rows of several caches belong together: the same images, or the same teacher."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dtcache.cache.batch import Rows
from dtcache.cache.cache import Cache
from dtcache.errors import CacheMismatchError, ConfigError
from dtcache.hashing import sha256_json
from dtcache.recipe import Json
from dtcache.row_set import RowSet
from dtcache.store.remote import Location

OF_A_TEACHER = (
    *("architecture", "weights_sha256", "config_sha256", "condition"),
    *("timesteps", "ddim_steps", "taps"),
)
"""Fields of a recipe's teacher that caches of one teacher over different images share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSet:
    """The images of one or several caches, in the row order of the first of them."""

    first_row: int
    """Row of the join at which this set begins."""
    caches: tuple[Cache, ...]
    rows: tuple[Rows | None, ...]
    """By cache: its row of each row of the set; None if its rows have the same order."""

    @property
    def usable(self) -> RowSet:
        """The rows of the set that every cache has features of."""
        if len(self.caches) == 1:
            return self.caches[0].reader.usable
        return RowSet.of(np.flatnonzero(self._present().all(0)))

    @property
    def num_lacking(self) -> int:
        """Number of rows that some caches have features of, and others do not."""
        if len(self.caches) == 1:
            return 0
        present = self._present()
        return int((present.any(0) & ~present.all(0)).sum())

    def _present(self) -> NDArray[np.bool_]:
        """Return whether each cache has features of each row of the set, (caches, rows)."""
        present = np.zeros((len(self.caches), len(self.caches[0].reader.samples)), np.bool_)
        for cache, rows, own in zip(self.caches, self.rows, present, strict=True):
            usable = np.zeros(len(own), np.bool_)
            usable[cache.reader.usable_rows] = True
            own[:] = usable if rows is None else usable[rows]
        return present

    def rows_in(self, number: int, rows: Rows) -> Rows:
        """Return the rows in cache `number` of this set, by rows of the set."""
        theirs = self.rows[number]
        return rows if theirs is None else theirs[rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedTeacher:
    """One teacher of a join: a cache for each image set."""

    name: str
    """The name of its first cache's folder; empty if it is the only teacher."""
    caches: tuple[Cache, ...]
    """By image set."""
    numbers: tuple[int, ...]
    """By image set: the number of its cache among the set's caches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """Caches, arranged by image set and by teacher."""

    sets: tuple[ImageSet, ...]
    teachers: tuple[JoinedTeacher, ...]
    shard_rows: int
    """Rows of a stretch that lies in one shard of each set's first cache."""


def join(caches: Sequence[Cache]) -> Join:
    """Arrange sealed caches.

    Caches with the same keys have the same images: each is one teacher. Caches of one teacher with
    different keys are its parts. Raises CacheMismatchError, naming caches and counts, if views
    differ, if images overlap in part or have other contents, or if a teacher lacks images that
    others have.
    """
    shard_rows = math.gcd(*(cache.shard_rows for cache in caches))
    groups: list[list[tuple[Cache, Rows | None]]] = []
    for cache in caches:
        _require_same_views(caches[0], cache)
        for group in groups:
            is_same, rows = _matched(group[0][0], cache)
            if is_same:
                group.append((cache, rows))
                break
        else:
            groups.append([(cache, None)])
    sets = []
    first_row = 0
    for group in groups:
        sets.append(
            ImageSet(
                first_row=first_row,
                caches=tuple(cache for cache, _ in group),
                rows=tuple(rows for _, rows in group),
            )
        )
        # Sets begin at a multiple of `shard_rows`, as shards do.
        first_row += -(-len(group[0][0].reader.samples) // shard_rows) * shard_rows
    teachers = _teachers(sets)
    names = teacher_names([teacher[0].reader.location for teacher, _ in teachers])
    return Join(
        sets=tuple(sets),
        teachers=tuple(
            JoinedTeacher(name=name, caches=members, numbers=numbers)
            for name, (members, numbers) in zip(names, teachers, strict=True)
        ),
        shard_rows=shard_rows,
    )


def teacher_names(locations: Sequence[Location]) -> list[str]:
    """Return a name per teacher: that of its cache's folder, numbered if it comes again.

    A name has letters, digits, dashes and underscores. The only teacher has an empty name.
    """
    if len(locations) == 1:
        return [""]
    names: list[str] = []
    for location in locations:
        folder = location.name if isinstance(location, Path) else location.address.rstrip("/")
        stem = re.sub(r"[^\w-]+", "-", folder.rpartition("/")[2].removesuffix(".cache"), flags=re.A)
        name = stem = stem.strip("-") or "cache"
        number = 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def _matched(first: Cache, cache: Cache) -> tuple[bool, Rows | None]:
    """Return whether both caches have the same images, and the row in `cache` of each row.

    The rows are None if their order is the same. Raises CacheMismatchError if some images are in
    one of the caches only, or if an image has other contents.
    """
    ours, theirs = (c.samples.select(["key", "content_sha256"]) for c in (first, cache))
    if ours.equals(theirs):
        return True, None
    places = pc.index_in(ours["key"], value_set=theirs["key"])
    common = len(places) - places.null_count
    if not common:
        return False, None
    if common < max(len(ours), len(theirs)):
        raise CacheMismatchError(
            f"{cache.reader.location}: {common} of its {len(theirs)} images are among the "
            f"{len(ours)} of {first.reader.location}. Expected the same images, or, of one "
            "teacher, other images; extract both from the same images"
        )
    changed = pc.fill_null(
        pc.not_equal(ours["content_sha256"], theirs["content_sha256"].take(places)), False
    )
    count = pc.sum(changed).as_py() or 0
    if count:
        raise CacheMismatchError(
            f"{cache.reader.location}: {count} of its images have other contents than in "
            f"{first.reader.location}, such as {ours['key'].filter(changed)[0]}; extract both from "
            "the same images"
        )
    rows = np.asarray(_numbers(places), np.int64)
    return True, None if np.array_equal(rows, np.arange(len(rows))) else rows


def _numbers(column: pa.ChunkedArray) -> NDArray[np.int32]:
    """Return a column without nulls as numbers."""
    numbers: NDArray[np.int32] = column.to_numpy()
    return numbers


def _require_same_views(first: Cache, cache: Cache) -> None:
    """Raise CacheMismatchError, naming the field, if caches show images in other views."""
    for name in ("height", "width", "resize_mode", "flips"):
        expected, got = (_view_fields(c)[name] for c in (first, cache))
        if expected != got:
            raise CacheMismatchError(
                f"{cache.reader.location}: expected `{name}` {expected}, as in "
                f"{first.reader.location}, got {got}; extract one of them again with the views of "
                "the other"
            )


def _view_fields(cache: Cache) -> Json:
    recipe = cache.reader.manifest.recipe
    return {**recipe["view"], "flips": recipe["flips"]}


def _teachers(sets: Sequence[ImageSet]) -> list[tuple[tuple[Cache, ...], tuple[int, ...]]]:
    """Return the caches of each teacher, by image set, and their numbers in the sets.

    If a set has several caches of one teacher, each of them counts as a teacher. Raises
    CacheMismatchError if a teacher has no cache for a set.
    """
    by_teacher: dict[str, list[list[int]]] = {}
    for place, images in enumerate(sets):
        for number, cache in enumerate(images.caches):
            numbers = by_teacher.setdefault(_teacher_of(cache), [[] for _ in sets])
            numbers[place].append(number)
    teachers = []
    for numbers in by_teacher.values():
        most = max(map(len, numbers))
        for place, of_set in enumerate(numbers):
            if len(of_set) < most:
                _refuse_gap(sets, numbers, place)
        for own in zip(*numbers, strict=True):
            members = tuple(images.caches[n] for images, n in zip(sets, own, strict=True))
            teachers.append((members, own))
    # The order in which the caches were given, within the first set.
    return sorted(teachers, key=lambda teacher: teacher[1])


def _teacher_of(cache: Cache) -> str:
    """Return a hash of everything that makes two caches ones of the same teacher."""
    recipe = cache.reader.manifest.recipe
    return sha256_json([recipe["teacher"].get(name) for name in OF_A_TEACHER])


def _refuse_gap(sets: Sequence[ImageSet], numbers: Sequence[Sequence[int]], place: int) -> None:
    """Raise CacheMismatchError: the teacher of caches `numbers` lacks the images of a set."""
    other, own = max(enumerate(numbers), key=lambda item: len(item[1]))
    cache = sets[other].caches[own[-1]]
    lacking = sets[place].caches[0]
    fields = ""
    teachers = [c.reader.manifest.recipe["teacher"] for c in (lacking, cache)]
    if teachers[0]["weights_sha256"] == teachers[1]["weights_sha256"]:
        differing = [n for n in OF_A_TEACHER if teachers[0].get(n) != teachers[1].get(n)]
        fields = f" (the weights are the same, `{differing[0]}` differs)" if differing else ""
    raise CacheMismatchError(
        f"{cache.reader.location} and {lacking.reader.location} have no image in common, and are "
        f"of different teachers{fields}. Expected caches of the same images, or of the same "
        "teacher; extract both from the same images"
    )


def require_sealed(caches: Sequence[Cache]) -> None:
    """Raise ConfigError if one of several caches is unfinished: it has no content hashes yet."""
    for cache in caches:
        if cache.reader.manifest.state != "sealed":
            raise ConfigError(
                f"{cache.reader.location} is not complete: expected sealed caches, as they are "
                "joined by content hash; run its dtcache extract command again, or train on it "
                "alone"
            )
