"""The remedy of each damaged file of a cache, and the plan of a repair. Nothing is written."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from dtcache.store.contents import Damage
from dtcache.store.layout import COMMITS, FAILURES, LABELS, LOG, SHARDS
from dtcache.store.verify import Verification


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """The plan or the outcome of repairing one damaged file."""

    path: str
    """Relative to the folder of the cache."""
    outcome: Literal["planned", "repaired", "refused", "impossible"]
    note: str
    """What the repair does, or why it did not write the file. Options appear as `field`."""


def repairable(damage: Damage) -> bool:
    """Return whether a repair can recompute the file and check it against a recorded hash."""
    return (
        damage.shard is not None
        or damage.path in (FAILURES, SHARDS)
        or damage.path.endswith("zarr.json")
    )


def remedy(damage: Damage, label_set: str | None = None) -> str:
    """Return what to do about one damaged file of a cache or, if named, of its label set.

    Options of `dtcache verify` appear as `field`.
    """
    if repairable(damage):
        needed = "`images` and `teacher`" if label_set is None else "`interpreter`"
        return f"run dtcache verify with `repair` and {needed}"
    if damage.path == LOG:
        return "delete it: it is only a log of the extraction"
    if damage.path.startswith(f"{COMMITS}/"):
        writer = "the extraction" if label_set is None else "dtcache label write"
        return f"delete it and run {writer} again, which recomputes the shard"
    return f"restore it from a copy, or {start_over(label_set)}"


def start_over(label_set: str | None) -> str:
    """Return how to write a cache or, if named, its label set from the beginning."""
    if label_set is None:
        return "delete this cache and extract it again"
    return f"delete {LABELS}/{label_set} and run dtcache label write again"


def planned_repairs(verification: Verification) -> list[Repair]:
    """Return the planned repair of each damaged file; nothing is computed or written."""
    plan = list(_planned(verification, None))
    for name, of_set in verification.labels.items():
        plan += [
            replace(repair, path=f"{LABELS}/{name}/{repair.path}")
            for repair in _planned(of_set, name)
        ]
    return plan


def _planned(verification: Verification, label_set: str | None) -> Iterator[Repair]:
    """Yield the plan for a cache or one of its label sets, with paths in its own folder."""
    rows_by_path = {
        wanted.path: wanted.array.rows_of(wanted.shard) for wanted in verification.contents.objects
    }
    for damage in verification.damage:
        if not repairable(damage):
            note = remedy(damage, label_set)
            yield Repair(path=damage.path, outcome="impossible", note=note)
        elif damage.shard is None:
            yield Repair(
                path=damage.path, outcome="planned", note="rebuild it from the other files"
            )
        else:
            source = "teacher" if label_set is None else "interpreter"
            count = len(rows_by_path[damage.path])
            note = f"recompute shard {damage.shard} ({count} images) with the {source}"
            yield Repair(path=damage.path, outcome="planned", note=note)
