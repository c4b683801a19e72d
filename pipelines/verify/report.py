"""A verification as JSON values and as lines for a terminal.

Remedies and notes name options as `field`. `in_words` replaces these by the words of the program
that shows them, such as the flags of a command.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice

from rich.console import Group, RenderableType
from rich.table import Table

from dtcache.recipe import Json
from dtcache.store.contents import Damage, SamplePlace
from dtcache.store.layout import LABELS
from dtcache.store.remote import Location
from dtcache.store.verify import Verification
from pipelines.verify.plan_repairs import Repair, remedy
from pipelines.verify.verify import Verified

WORDS = {"good": "good", "damaged": "DAMAGED", "incomplete": "INCOMPLETE"}
SHOWN = 20
"""Damaged files, and unnamed files, that the terminal shows; JSON has all of them."""

MAX_SAMPLES = 1_000_000
"""Most samples that the JSON report of a cache lists, over all damaged files."""

InWords = Callable[[str], str]


def verified_json(verified: Verified, in_words: InWords = str) -> Json:
    """Return a verification as JSON values; `view` is null if all views of a sample are affected.

    `labels` has the same fields for each label set, by name, with paths relative to the set's
    folder. A label set that this version cannot read has only `state` and `reason`.
    """
    report = _verification_json(verified.verification, None, in_words)
    if verified.repairs is not None:
        report["repair"] = [
            asdict(repair) | {"note": in_words(repair.note)} for repair in verified.repairs
        ]
    return report


def _verification_json(
    verification: Verification, label_set: str | None, in_words: InWords
) -> Json:
    contents = verification.contents
    places = islice(
        (
            (number, {"row": s.row, "key": s.key, "view": s.view})
            for number, damage in enumerate(verification.damage)
            for s in damage.samples
        ),
        MAX_SAMPLES,
    )
    samples: dict[int, list[Json]] = defaultdict(list)
    for number, sample in places:
        samples[number].append(sample)
    labels: Json = {
        name: _verification_json(of_set, name, in_words)
        for name, of_set in verification.labels.items()
    }
    labels |= {
        name: {"state": "unreadable", "reason": reason}
        for name, reason in verification.unreadable.items()
    }
    return {
        "state": verification.state,
        "sealed": contents.sealed,
        "fingerprint": contents.manifest.fingerprint if contents.manifest is not None else None,
        "num_objects": len(contents.objects),
        "num_checked": len(verification.checked),
        "bytes_checked": sum(wanted.size or 0 for wanted in verification.checked),
        "missing_shards": list(contents.missing),
        "damage": [
            {
                "path": damage.path,
                "reason": damage.reason,
                "remedy": in_words(remedy(damage, label_set)),
                "shard": damage.shard,
                "array": damage.array,
                "samples": samples[number],
            }
            for number, damage in enumerate(verification.damage)
        ],
        "unnamed": verification.unnamed,
        "labels": labels,
    }


def render_verified(verified: Verified, root: Location, in_words: InWords = str) -> RenderableType:
    """Return a verification as a table of facts and lines that fit a narrow terminal."""
    verification = verified.verification
    lines = _damage_lines(verification, None)
    for name, of_set in verification.labels.items():
        lines += _damage_lines(of_set, name)
    unnamed = verification.unnamed
    lines += [f"not named: {name}: {why}" for name, why in islice(unnamed.items(), SHOWN)]
    lines += _more(len(unnamed))
    if verified.repairs is not None:
        lines += _repair_lines(verified.repairs)
    return Group(_facts(verification, root), *(in_words(line) for line in lines))


def _facts(verification: Verification, root: Location) -> Table:
    """Return the state of the cache and of each label set, and how much was checked."""
    contents = verification.contents
    num_checked = len(verification.checked)
    num_objects = len(contents.objects)
    size = sum(wanted.size or 0 for wanted in verification.checked) / 2**20
    scope = (
        "every byte"
        if num_checked == num_objects
        else f"A SAMPLE: {num_checked} of {num_objects} shard files"
    )
    table = Table(title=str(root), show_header=False, title_justify="left")
    table.add_row("state", WORDS[verification.own_state])
    table.add_row("checked", f"{scope}, {size:.1f} MiB of shards")
    finish = "run the extraction again to finish it"
    if contents.missing:
        table.add_row("missing", f"{len(contents.missing)} shards; {finish}")
    elif not contents.sealed and contents.manifest is not None:
        table.add_row("missing", f"the seal; {finish}")
    table.add_row("damaged", f"{len(verification.damage)} files")
    for name, of_set in verification.labels.items():
        state = WORDS[of_set.state]
        if of_set.state == "incomplete":
            state += "; run dtcache label write again to finish it"
        table.add_row(f"labels {name}", state)
    for name, reason in verification.unreadable.items():
        table.add_row(f"labels {name}", f"not readable by this version: {reason}")
    return table


def _damage_lines(verification: Verification, label_set: str | None) -> list[str]:
    """Describe the first damaged files of a cache or one of its label sets, and count the rest."""
    lines = []
    for damage in islice(verification.damage, SHOWN):
        lines += _lines(damage, label_set)
    return lines + _more(len(verification.damage))


def _lines(damage: Damage, label_set: str | None) -> list[str]:
    """Return the file and the reason, the affected samples, and the remedy."""
    folder = f"{LABELS}/{label_set}/" if label_set is not None else ""
    lines = [f"{folder}{damage.path}: {damage.reason}"]
    if damage.shard is not None:
        samples = ", ".join(map(_sample, damage.samples[:3]))
        more = f" and {len(damage.samples) - 3} more" if len(damage.samples) > 3 else ""
        lines.append(f"  shard {damage.shard} of {damage.array}: {samples}{more}")
    return [*lines, f"  {remedy(damage, label_set)}"]


def _sample(sample: SamplePlace) -> str:
    name = sample.key if sample.key is not None else f"row {sample.row}"
    return name if sample.view is None else f"{name} view {sample.view}"


def _repair_lines(repairs: tuple[Repair, ...]) -> list[str]:
    """Return the plan or the outcome per file and, for a plan, what is needed to run it."""
    if not repairs:
        return ["nothing to repair"]
    lines = [f"{repair.outcome}: {repair.path}: {repair.note}" for repair in repairs]
    planned = [repair.path for repair in repairs if repair.outcome == "planned"]
    needed = []
    if any(not path.startswith(f"{LABELS}/") for path in planned):
        needed.append("`images` and `teacher`")
    if any(path.startswith(f"{LABELS}/") for path in planned):
        needed.append("`interpreter`")
    if needed:
        lines.append(
            f"nothing was written; to repair, pass {' and '.join(needed)} and leave out `dry_run`"
        )
    return lines


def _more(count: int) -> list[str]:
    return [f"... and {count - SHOWN} more; the JSON report lists all"] if count > SHOWN else []
