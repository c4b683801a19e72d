"""Checks every byte of a cache against the hashes recorded when it was written; never writes."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args

from dtcache.errors import CacheBusyError, CacheDamagedError
from dtcache.hashing import file_problem
from dtcache.json_files import read_hashed_json
from dtcache.rng import permuted
from dtcache.store.contents import Contents, Damage, SamplePlaces, WantedObject, unnamed_files
from dtcache.store.layout import FAILURES, LOG, MAX_LOG_BYTES, SAMPLES, SHARDS
from dtcache.store.manifest import CacheManifest, read_manifest
from dtcache.store.open_files import OpenFile
from dtcache.store.shard_check import shard_difference

State = Literal["damaged", "unreadable", "incomplete", "good"]
STATES: tuple[State, ...] = get_args(State)
"""Verdicts, the worst first."""
THREADS = 4
"""Files that are hashed at the same time: hashing releases the GIL."""
LARGE = 1 << 24
"""If payloads can have more bytes, one file is checked at a time."""


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


class CheckedFiles(Protocol):
    """The files of a cache that is checked."""

    root: Path
    """The folder with all files except, perhaps, the shards."""

    def size(self, path: str) -> int | None:
        """Return the bytes of a shard file; None if there is none."""

    def at_hand(self, path: str) -> AbstractContextManager[Path]:
        """Have a shard file below `root` for the time of the block; yield `root`."""

    def manifest(self) -> CacheManifest:
        """Return the manifest as it is now."""

    def names(self) -> list[str]:
        """Return the paths of all files, in order."""


class LocalFiles:
    """The files of a cache in a folder."""

    def __init__(self, root: Path) -> None:
        """Take the folder."""
        self.root = root

    def size(self, path: str) -> int | None:
        """Return the bytes of a shard file; None if there is none."""
        file = self.root / path
        return file.stat().st_size if file.is_file() else None

    def at_hand(self, path: str) -> AbstractContextManager[Path]:
        """Yield the folder, which has the file."""
        return nullcontext(self.root)

    def manifest(self) -> CacheManifest:
        """Return the manifest as it is now."""
        return read_manifest(self.root)

    def names(self) -> list[str]:
        """Return the paths of all files, in order."""
        files = sorted(p for p in self.root.rglob("*") if p.is_symlink() or not p.is_dir())
        return [path.relative_to(self.root).as_posix() for path in files]


def verify_contents(
    files: CheckedFiles,
    contents: Contents,
    chosen: Sequence[WantedObject],
    on_object: Callable[[WantedObject], None],
) -> Verification:
    """Check the chosen shard files, the sizes of the other shard files, and all other files.

    Raises CacheBusyError if the cache was sealed meanwhile.
    """
    root = files.root
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
            and (found := _size_damage(files, wanted, contents.keys))
        ]
        is_large = any(a.length > LARGE for a in contents.manifest.arrays.values())
        threads = 1 if is_large else THREADS  # each may hold two payloads of a damaged shard
        with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
            try:
                checks = pool.map(
                    lambda wanted: check_object(files, wanted, contents.keys, path_of), chosen
                )
                for wanted, found in zip(chosen, checks, strict=True):
                    damage += [found] if found is not None else []
                    on_object(wanted)
            finally:
                pool.shutdown(cancel_futures=True)
        if not contents.sealed and files.manifest().state == "sealed":
            raise CacheBusyError(
                f"{root}: the cache was finished while it was being checked; check it again"
            )
    unnamed = unnamed_files(files.names(), contents)
    return Verification(
        contents=contents, damage=tuple(damage), unnamed=unnamed, checked=tuple(chosen)
    )


def check_object(
    files: CheckedFiles,
    wanted: WantedObject,
    keys: Sequence[str] | None,
    path_of: Mapping[str, str],
) -> Damage | None:
    """Check every byte of one shard file; if it differs, find out which samples are affected.

    `path_of` gives the path of every recorded hash, so that a misplaced shard file is recognised.
    """
    found = _size_damage(files, wanted, keys)
    if found is not None:
        return found
    try:
        with files.at_hand(wanted.path) as root:
            file = OpenFile(root / wanted.path)
            difference = shard_difference(
                file, wanted.sha256, wanted.array, wanted.shard, path_of.get
            )
    except CacheDamagedError as error:
        return _damage(wanted, str(error), None, keys)
    if difference is None:
        return None
    return _damage(wanted, difference.reason, list(difference.bad or ()) or None, keys)


def _size_damage(
    files: CheckedFiles, wanted: WantedObject, keys: Sequence[str] | None
) -> Damage | None:
    size = files.size(wanted.path)
    if size is None:
        return _damage(wanted, "no file", None, keys)
    if wanted.size is not None and size != wanted.size:
        return _damage(wanted, f"expected {wanted.size} bytes, got {size}", None, keys)
    return None


def _damage(
    wanted: WantedObject, reason: str, entries: Sequence[int] | None, keys: Sequence[str] | None
) -> Damage:
    """Describe a damaged shard file by the samples of its `entries`, or all samples if None."""
    return Damage(
        path=wanted.path,
        reason=reason,
        array=wanted.array.name,
        shard=wanted.shard,
        samples=SamplePlaces(wanted, keys, entries),
    )


def _file_damage(root: Path, contents: Contents) -> list[Damage]:
    """Check the files that hold no shard, except those that `read_contents` has checked."""
    files = contents.manifest.files if contents.manifest is not None else {}
    checked = {SAMPLES, SHARDS} | ({FAILURES} if contents.keys is not None else set())
    problems = {
        name: file_problem(root / name, sha256)
        for name, sha256 in files.items()
        if name not in checked
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
