"""What `dtcache verify` does and shows: every byte of a cache against its recorded hashes; writes only to repair."""

from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dtcache.errors import CacheFormatError, ConfigError
from dtcache.options import VerifyOptions, parse_share
from dtcache.recipe import Json
from dtcache.store.contents import Damage, WantedObject, read_contents
from dtcache.store.label_sets import label_set_names
from dtcache.store.layout import COMMITS, LABELS, LOG, MANIFEST, SHARDS
from dtcache.store.verify import Verification, chosen_objects, verify_contents
from pipelines.terminal.progress import track
from pipelines.terminal.text import printable

NOT_A_CACHE = 5
EXIT_CODES = {"good": 0, "damaged": 3, "incomplete": 4, "unreadable": NOT_A_CACHE}
WORDS = {"good": "good", "damaged": "DAMAGED", "incomplete": "INCOMPLETE"}
SHOWN = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """What a repair would do, or did, about one damaged file."""

    path: str
    """In the folder of the cache."""
    outcome: Literal["planned", "repaired", "refused", "impossible"]
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What `dtcache verify` found and did."""

    found: Verification
    """After the repair, where there was one."""
    repairs: tuple[Repair, ...] | None
    """By damaged file; None where none was asked for."""


def verify(root: Path, options: VerifyOptions) -> Verified:
    """Check a cache, finished or not, and repair it or show what a repair would do where that is asked for.

    Raises CacheNotFoundError, CacheFormatError, ConfigError, CacheBusyError where the cache was finished meanwhile,
    and what `repair_cache` raises.
    """
    share = parse_share(options.sample, "--sample")
    if not options.repair and (options.images or options.teacher or options.interpreter):
        raise ConfigError(
            "--images, --teacher and --interpreter: expected --repair beside them; a verification alone needs none"
        )
    if not options.yes:
        found = verify_cache(root, share, options.seed)
        return Verified(
            found=found, repairs=tuple(planned_repairs(found)) if options.repair else None
        )
    if not (options.repair and (options.interpreter or (options.images and options.teacher))):
        raise ConfigError(
            "--yes: expected --repair, --images and --teacher beside it, to make damaged shards anew; or --repair and "
            "--interpreter, for those of label sets"
        )
    from pipelines.verify.repair import repair_cache  # loads torch, as verifying alone must not

    found, repairs = repair_cache(root, options, share)
    return Verified(found=found, repairs=tuple(repairs))


def verify_cache(root: Path, share: float, seed: int) -> Verification:
    """Check a share of the shards of a cache and of its label sets, chosen by `seed`, and all their other files."""
    labels = {}
    unreadable = {}
    for name in label_set_names(root):
        try:
            labels[name] = _verify_one(root / LABELS / name, share, seed)
        except CacheFormatError as error:
            unreadable[name] = str(error).removeprefix(f"{root / LABELS / name / MANIFEST}: ")
    return replace(_verify_one(root, share, seed), labels=labels, unreadable=unreadable)


def _verify_one(root: Path, share: float, seed: int) -> Verification:
    """Check a cache or a label set, showing progress."""
    contents = read_contents(root)
    chosen = chosen_objects(contents, share, seed)
    done = 0
    with track("verify", len(chosen)) as progress:

        def on_object(wanted: WantedObject) -> None:
            nonlocal done
            done += wanted.size or 0
            progress.advance(1, f"{done / 2**20:.1f} MiB")

        return verify_contents(root, contents, chosen, on_object)


def repairable(damage: Damage) -> bool:
    """Return whether `--repair` can make the file anew: what it held follows from the recipe and a recorded hash."""
    return damage.shard is not None or damage.path == SHARDS or damage.path.endswith("zarr.json")


def remedy(damage: Damage, label_set: str | None = None) -> str:
    """Return what to do about one damage, of a cache or of one of its label sets."""
    if repairable(damage):
        needed = (
            "--images IMAGES --teacher TEACHER"
            if label_set is None
            else "--interpreter INTERPRETER"
        )
        return f"run dtcache verify with --repair {needed} --yes"
    if damage.path == LOG:
        return "delete it: it only tells how the extraction went"
    if damage.path.startswith(f"{COMMITS}/"):
        writer = "the extraction" if label_set is None else "its dtcache label write"
        return f"delete it and run {writer} again: it computes the shard anew"
    return f"restore it from a copy, or {afresh(label_set)}"


def afresh(label_set: str | None) -> str:
    """Return how a cache, or one of its label sets, is made once more from nothing."""
    if label_set is None:
        return "delete this cache and extract it again"
    return f"delete {LABELS}/{label_set} and run its dtcache label write again"


def planned_repairs(found: Verification, label_set: str | None = None) -> list[Repair]:
    """Return what `--repair --yes` would try, file by file; nothing is computed or written for it."""
    plan = []
    for damage in found.damage:
        path = damage.path if label_set is None else f"{LABELS}/{label_set}/{damage.path}"
        if not repairable(damage):
            plan.append(Repair(path=path, outcome="impossible", note=remedy(damage, label_set)))
        elif damage.shard is None:
            plan.append(Repair(path=path, outcome="planned", note="make it from the other files"))
        else:
            source = "teacher" if label_set is None else "interpreter"
            note = f"compute shard {damage.shard} ({len(rows_of(found, damage))} images) again with the {source}"
            plan.append(Repair(path=path, outcome="planned", note=note))
    return plan + [
        repair for name, inner in found.labels.items() for repair in planned_repairs(inner, name)
    ]


def rows_of(found: Verification, damage: Damage) -> range:
    """Return the rows of the shard that a damaged file belongs to."""
    assert (
        found.contents.manifest is not None
        and damage.array is not None
        and damage.shard is not None
    )
    return found.contents.manifest.arrays[damage.array].rows_of(damage.shard)


def verified_json(verified: Verified, label_set: str | None = None) -> Json:
    """Return a verification as JSON values; `view` is null where all views of a sample are affected.

    `labels` has the same of each label set, by name, with paths in its own folder; of one that this dtcache does not
    read it has `state` and `reason`.
    """
    found = verified.found
    repairs = verified.repairs
    contents = found.contents
    return {
        "state": found.state,
        "sealed": contents.sealed,
        "fingerprint": contents.manifest.fingerprint if contents.manifest is not None else None,
        "num_objects": len(contents.objects),
        "num_checked": len(found.checked),
        "bytes_checked": sum(wanted.size or 0 for wanted in found.checked),
        "missing_shards": list(contents.missing),
        "damage": [
            {
                "path": damage.path,
                "reason": damage.reason,
                "remedy": remedy(damage, label_set),
                "shard": damage.shard,
                "array": damage.array,
                "samples": [{"row": s.row, "key": s.key, "view": s.view} for s in damage.samples],
            }
            for damage in found.damage
        ],
        "unnamed": found.unnamed,
        "labels": {
            name: verified_json(Verified(found=inner, repairs=None), name)
            for name, inner in found.labels.items()
        }
        | {
            name: {"state": "unreadable", "reason": reason}
            for name, reason in found.unreadable.items()
        },
        **({"repair": [asdict(repair) for repair in repairs]} if repairs is not None else {}),
    }


def render_verified(verified: Verified, root: Path) -> RenderableType:
    """Return a verification as narrow lines for a terminal."""
    found = verified.found
    contents = verified.found.contents
    facts = Table(title=Text(str(root)), show_header=False, title_justify="left")
    everything = len(found.checked) == len(contents.objects)
    size = sum(wanted.size or 0 for wanted in found.checked) / 2**20
    share = (
        "every byte"
        if everything
        else f"A SAMPLE: {len(found.checked)} of {len(contents.objects)} shard files"
    )
    facts.add_row("state", WORDS[found.own_state])
    facts.add_row("checked", f"{share}, {size:.1f} MiB of shards")
    if contents.missing:
        facts.add_row(
            "missing", f"{len(contents.missing)} shards; run the extraction again to finish it"
        )
    elif not contents.sealed and contents.manifest is not None:
        facts.add_row("missing", "the seal; run the extraction again to finish it")
    facts.add_row("damaged", f"{len(found.damage)} files")
    lines = [line for damage in islice(found.damage, SHOWN) for line in _lines(damage)]
    for name, inner in found.labels.items():
        finish = (
            "; run its dtcache label write again to finish it"
            if inner.state == "incomplete"
            else ""
        )
        facts.add_row(f"labels {name}", f"{WORDS[inner.state]}{finish}")
        lines += [line for damage in inner.damage[:SHOWN] for line in _lines(damage, name)]
    for name, reason in found.unreadable.items():
        facts.add_row(f"labels {name}", Text(printable(f"not read by this version: {reason}")))
    lines += _rest(len(found.damage))
    lines += [f"not named: {name}: {why}" for name, why in islice(found.unnamed.items(), SHOWN)]
    lines += _rest(len(found.unnamed))
    if verified.repairs is not None:
        lines += [f"{repair.outcome}: {repair.path}: {repair.note}" for repair in verified.repairs]
        if not verified.repairs:
            lines.append("nothing to repair")
        of_labels = {
            r.path.startswith(f"{LABELS}/") for r in verified.repairs if r.outcome == "planned"
        }
        if of_labels:
            needed = ", ".join(
                "--interpreter" if of_set else "--images, --teacher" for of_set in sorted(of_labels)
            )
            lines.append(f"nothing was written: add {needed} and --yes to do what is planned")
    return Group(facts, *map(Text, lines))


def _rest(count: int) -> list[str]:
    return [f"... and {count - SHOWN} more; --json has all"] if count > SHOWN else []


def _lines(damage: Damage, label_set: str | None = None) -> list[str]:
    """Describe one damage: the file, the samples, what to do."""
    where = f"{LABELS}/{label_set}/" if label_set is not None else ""
    lines = [f"{where}{damage.path}: {damage.reason}"]
    if damage.shard is not None:
        some = ", ".join(
            (s.key if s.key is not None else f"row {s.row}")
            + (f" view {s.view}" if s.view is not None else "")
            for s in damage.samples[:3]
        )
        more = f" and {len(damage.samples) - 3} more" if len(damage.samples) > 3 else ""
        lines.append(f"  shard {damage.shard} of {damage.array}: {some}{more}")
    return [*lines, f"  {remedy(damage, label_set)}"]
