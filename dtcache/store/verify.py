"""Checks every byte of a cache against the hashes recorded when it was written; never writes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from dtcache.errors import CacheBusyError, CacheDamagedError
from dtcache.hashing import file_problem, file_sha256
from dtcache.json_files import read_hashed_json
from dtcache.rng import permuted
from dtcache.store.contents import Contents, Damage, SamplePlace, WantedObject, unnamed_files
from dtcache.store.layout import IMAGES, LOG, MANIFEST, MAX_LOG_BYTES, SAMPLES, SHARDS, PayloadArray
from dtcache.store.shard import ABSENT, index_bytes, parse_index, unpack_chunk

State = Literal["damaged", "unreadable", "incomplete", "good"]
STATES: tuple[State, ...] = get_args(State)
"""Verdicts, the worst first."""
THREADS = 4
"""Files that are hashed at the same time: hashing releases the GIL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The result of checking a cache."""

    contents: Contents
    damage: tuple[Damage, ...]
    unnamed: dict[str, str]
    """Files in the folder that the cache does not name, each with a reason; they are not damage."""
    checked: tuple[WantedObject, ...]
    """The shard files of which every byte was read."""
    labels: dict[str, "Verification"] = field(default_factory=dict)
    """The results of the cache's label sets, by name."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Label sets in a format that this dtcache does not read, by name, with the reason."""

    @property
    def own_state(self) -> State:
        """The verdict on the cache without its label sets."""
        return "damaged" if self.damage else "good" if self.contents.sealed else "incomplete"

    @property
    def state(self) -> State:
        """The worst verdict on the cache and its label sets."""
        states: set[State] = {self.own_state, *(labels.state for labels in self.labels.values())}
        if self.unreadable:
            states.add("unreadable")
        return min(states, key=STATES.index)


def chosen_objects(contents: Contents, fraction: float, seed: int) -> list[WantedObject]:
    """Return the shard files of a fraction (0 to 1] of the shards, at least one shard.

    A pure function of its arguments.
    """
    shards = sorted({wanted.shard for wanted in contents.objects})
    count = min(len(shards), max(1, math.ceil(fraction * len(shards))))
    indices = permuted(len(shards), seed=seed, stream="verify")[:count]
    chosen = {shards[index] for index in indices}
    return [wanted for wanted in contents.objects if wanted.shard in chosen]


def verify_contents(
    root: Path,
    contents: Contents,
    chosen: Sequence[WantedObject],
    on_object: Callable[[WantedObject], None],
) -> Verification:
    """Check the chosen shard files, the sizes of the other shard files, and all other files.

    Raises CacheBusyError if the cache was sealed meanwhile.
    """
    damage = list(contents.damage)
    if contents.manifest is not None:
        damage += _file_damage(root, contents)
        path_of = {
            wanted.sha256: wanted.path for wanted in contents.objects if wanted.sha256 is not None
        }
        read_fully = {wanted.path for wanted in chosen}
        damage += [
            found
            for wanted in contents.objects
            if wanted.path not in read_fully
            and (found := _size_damage(root, wanted, contents.keys))
        ]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="verify") as pool:
            try:
                checks = pool.map(
                    lambda wanted: check_object(root, wanted, contents.keys, path_of), chosen
                )
                for wanted, found in zip(chosen, checks, strict=True):
                    damage += [found] if found is not None else []
                    on_object(wanted)
            finally:
                pool.shutdown(cancel_futures=True)
        if not contents.sealed and b'"state":"sealed"' in (root / MANIFEST).read_bytes():
            raise CacheBusyError(
                f"{root}: the cache was finished while it was being checked; check it again"
            )
    unnamed = unnamed_files(root, contents)
    return Verification(
        contents=contents, damage=tuple(damage), unnamed=unnamed, checked=tuple(chosen)
    )


def check_object(
    root: Path, wanted: WantedObject, keys: Sequence[str] | None, path_of: Mapping[str, str]
) -> Damage | None:
    """Check every byte of one shard file; if it differs, find out which samples are affected.

    `path_of` gives the path of every recorded hash, so that a misplaced shard file is recognised.
    """
    found = _size_damage(root, wanted, keys)
    if found is not None:
        return found
    path = root / wanted.path
    try:
        got = file_sha256(path)
        if got == wanted.sha256:
            return None
        bad = bad_entries(path.read_bytes(), wanted.array, wanted.shard)
    except CacheDamagedError as error:
        return _damage(wanted, str(error), None, keys)
    except OSError as error:
        return _damage(wanted, f"it cannot be read ({error.strerror})", None, keys)
    if bad:
        reasons = ", ".join(dict.fromkeys(bad.values()))
        return _damage(wanted, f"{len(bad)} of its chunks: {reasons}", bad, keys)
    if wanted.sha256 is None:
        return None
    actual = f"it is {path_of[got]}" if got in path_of else f"got {got[:16]}..., every chunk intact"
    return _damage(wanted, f"expected SHA-256 {wanted.sha256[:16]}..., {actual}", None, keys)


def bad_entries(content: bytes, array: PayloadArray, shard: int) -> dict[int, str]:
    """Return the damage of each damaged chunk of a shard, by its number in the index.

    Raises CacheDamagedError if the index itself is damaged, because no chunk can then be found.
    """
    entries = array.shard_rows * array.payloads_per_row
    index = parse_index(content[-index_bytes(entries) :], entries, len(content))
    out = np.empty(array.length, np.uint8)
    bad = {}
    for entry in range(len(array.rows_of(shard)) * array.payloads_per_row):
        offset, size = (int(value) for value in index[entry])
        try:
            if offset == ABSENT:
                raise CacheDamagedError("the shard holds no such chunk")
            unpack_chunk(content[offset : offset + size], out)
        except CacheDamagedError as error:
            bad[entry] = str(error)
    return bad


def _size_damage(root: Path, wanted: WantedObject, keys: Sequence[str] | None) -> Damage | None:
    path = root / wanted.path
    if not path.is_file():
        return _damage(wanted, "no file", None, keys)
    size = path.stat().st_size
    if wanted.size is not None and size != wanted.size:
        return _damage(wanted, f"expected {wanted.size} bytes, got {size}", None, keys)
    return None


def _damage(
    wanted: WantedObject, reason: str, entries: Iterable[int] | None, keys: Sequence[str] | None
) -> Damage:
    """Describe a damaged shard file by the samples of its `entries`, or all samples if None."""
    array = wanted.array
    rows = wanted.array.rows_of(wanted.shard)
    places: list[tuple[int, int | None]] = [(row, None) for row in rows]
    if entries is not None:
        places = [
            (rows[entry // array.payloads_per_row], entry % array.payloads_per_row)
            for entry in entries
        ]
    samples = tuple(
        SamplePlace(
            row=row,
            key=keys[row] if keys is not None else None,
            view=None if array.name == IMAGES else view,
        )
        for row, view in places
    )
    return Damage(
        path=wanted.path, reason=reason, array=array.name, shard=wanted.shard, samples=samples
    )


def _file_damage(root: Path, contents: Contents) -> list[Damage]:
    """Check the files that hold no shard, except those that `read_contents` has checked."""
    files = contents.manifest.files if contents.manifest is not None else {}
    problems = {
        name: file_problem(root / name, sha256)
        for name, sha256 in files.items()
        if name not in (SAMPLES, SHARDS)
    }
    problems[LOG] = log_problem(root / LOG)
    return [
        Damage(path=name, reason=reason) for name, reason in problems.items() if reason is not None
    ]


def log_problem(path: Path) -> str | None:
    """Return the damage of the extraction log, or None. The log holds its own hash."""
    if not path.exists():
        return None
    try:
        _, intact = read_hashed_json(path, MAX_LOG_BYTES)
    except (ValueError, OSError) as error:
        return f"not an extraction log ({error})"
    return None if intact else "its own checksum does not match"
