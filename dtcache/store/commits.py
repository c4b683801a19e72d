"""Commit records: the file that makes a shard part of the cache."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from dtcache.atomic_files import write_file
from dtcache.errors import CacheDamagedError
from dtcache.hashing import canonical_json
from dtcache.json_files import read_hashed_json, with_own_hash
from dtcache.recipe import FailedSample, Json
from dtcache.store.layout import COMMITS

_SHA256 = re.compile("[0-9a-f]{64}")
ANEW = "delete it and run dtcache extract again"
MAX_COMMIT_BYTES = 256 << 20
"""Enough for a shard of 2^20 rows, each with a hash and a failure reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardObject:
    """One file of a shard."""

    path: str
    """Relative to the cache folder."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecSums:
    """Sums of one tap over the rows of a shard."""

    squared_error: float
    """Float64, without the rows of the codec's fit."""
    energy: float
    """Sum of squares about the channel means of the data set, after whitening, without these rows.
    """
    section_bytes: int
    """Bytes of the tap's sections, of all rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmptySample:
    """A sample with features whose image surely shows nothing."""

    row: int
    key: str
    reason: str
    """Such as `all white`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitRecord:
    """One finished shard."""

    shard: int
    fingerprint: str
    """Fingerprint of the recipe that the shard was computed with."""
    objects: tuple[ShardObject, ...]
    content_sha256: tuple[str | None, ...]
    """SHA-256 of each row's source bytes; None if the image failed."""
    failures: tuple[FailedSample, ...]
    sums: dict[str, CodecSums]
    empty: tuple[EmptySample, ...] = ()
    """Told at the end of the extraction; not part of the sealed cache."""

    def to_json(self) -> Json:
        """Return the record as JSON values, with its own hash."""
        body: Json = {
            "shard": self.shard,
            "fingerprint": self.fingerprint,
            "objects": [
                {"path": o.path, "bytes": o.size, "sha256": o.sha256} for o in self.objects
            ],
            "content_sha256": list(self.content_sha256),
            "failures": [{"row": f.row, "key": f.key, "reason": f.reason} for f in self.failures],
            "sums": {n: asdict(s) for n, s in self.sums.items()},
        }
        if self.empty:
            body["empty"] = [{"row": e.row, "key": e.key, "reason": e.reason} for e in self.empty]
        return with_own_hash(body)


def commit_path(root: Path, shard: int) -> Path:
    """Return the path of a shard's commit record."""
    return root / COMMITS / f"{shard:06d}.json"


def write_commit(root: Path, record: CommitRecord) -> None:
    """Write a commit record atomically. From then on the shard is part of the cache."""
    write_file(commit_path(root, record.shard), canonical_json(record.to_json()))


def read_commits(root: Path) -> dict[int, CommitRecord]:
    """Read all commit records by shard. Raises CacheDamagedError if one is damaged."""
    records = (read_commit(path) for path in commit_files(root))
    return {record.shard: record for record in records}


def commit_files(root: Path) -> list[Path]:
    """Return the files of all commit records, in shard order."""
    folder = root / COMMITS
    return sorted(folder.glob("[0-9]*.json")) if folder.is_dir() else []


def is_commit(path: str) -> bool:
    """Return whether a path relative to the cache is that of a commit record."""
    return re.fullmatch(rf"{COMMITS}/[0-9][^/]*\.json", path) is not None


def read_commit(path: Path) -> CommitRecord:
    """Read one commit record.

    Raises CacheDamagedError if its bytes are not those that were written.
    """
    try:
        value, whole = read_hashed_json(path, MAX_COMMIT_BYTES)
        if not whole:
            raise ValueError("its own checksum does not match")
        if path.name != f"{value['shard']:06d}.json":
            raise ValueError(f"it belongs to shard {value['shard']}")
        _check_types(value)
        return CommitRecord(
            shard=value["shard"],
            fingerprint=value["fingerprint"],
            objects=tuple(
                ShardObject(path=o["path"], size=o["bytes"], sha256=o["sha256"])
                for o in value["objects"]
            ),
            content_sha256=tuple(value["content_sha256"]),
            failures=tuple(
                FailedSample(row=f["row"], key=f["key"], reason=f["reason"])
                for f in value["failures"]
            ),
            sums={n: CodecSums(**s) for n, s in value["sums"].items()},
            empty=tuple(
                EmptySample(row=e["row"], key=e["key"], reason=e["reason"])
                for e in value.get("empty", ())
            ),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CacheDamagedError(
            f"{path}: not a commit record of dtcache ({error}); {ANEW}"
        ) from error


def _check_types(value: Json) -> None:
    """Check the types of a record's values. Raises KeyError, TypeError or ValueError."""
    objects = value["objects"]
    failures = [*value["failures"], *value.get("empty", ())]
    sums = value["sums"].values()
    numbers = [
        value["shard"],
        *(o["bytes"] for o in objects),
        *(f["row"] for f in failures),
        *(s["section_bytes"] for s in sums),
    ]
    words = [
        value["fingerprint"],
        *(o["path"] for o in objects),
        *(f[n] for f in failures for n in ("key", "reason")),
    ]
    hashes = [
        *(o["sha256"] for o in objects),
        *(sha for sha in value["content_sha256"] if sha is not None),
    ]
    for expected, values, is_valid in (
        ("a count", numbers, lambda x: type(x) is int and x >= 0),
        ("text", words, lambda x: isinstance(x, str)),
        ("a SHA-256", hashes, lambda x: isinstance(x, str) and _SHA256.fullmatch(x)),
        (
            "a finite number",
            [x for s in sums for x in s.values()],
            lambda x: type(x) in (int, float) and isfinite(x),
        ),
    ):
        for x in values:
            if not is_valid(x):
                raise ValueError(f"expected {expected}, got {str(x)[:40]!r}")


def total_sums(records: Iterable[CommitRecord]) -> dict[str, CodecSums]:
    """Add up the sums of records in the given order.

    Give them in shard order: a floating-point sum depends on the order.
    """
    totals: dict[str, CodecSums] = {}
    for record in records:
        for name, sums in record.sums.items():
            so_far = totals.get(name, CodecSums(squared_error=0.0, energy=0.0, section_bytes=0))
            totals[name] = CodecSums(
                squared_error=so_far.squared_error + sums.squared_error,
                energy=so_far.energy + sums.energy,
                section_bytes=so_far.section_bytes + sums.section_bytes,
            )
    return totals
