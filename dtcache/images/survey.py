"""What a source read and what it left out, in one line and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from dtcache.class_names import listed, misnumbered
from dtcache.images.left_out import MAX_EXAMPLES, LeftOut
from dtcache.names import differ_in_form, normal_form, shown
from dtcache.recipe import Json
from dtcache.samples import Column

SPLITS = frozenset(
    ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")
)
"""Usual names of the splits of a data set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What a source holds: images, classes, and what was left out."""

    num_images: int
    class_names: tuple[str, ...] | None
    class_counts: dict[int, int]
    """Images by label, ascending; a negative label is none."""
    left_out: LeftOut
    notes: tuple[str, ...]
    """Sentences about labels that a user may not expect; they name options in backticks."""

    @property
    def summary(self) -> str:
        """The survey in one line: images, classes, and what was left out."""
        left_out = (
            f"; left out: {self.left_out}{self.left_out.remedy}" if self.left_out.counts else ""
        )
        plural = "" if self.num_images == 1 else "s"
        return f"{self.num_images} image{plural} {self._classes()}{left_out}"

    def _classes(self) -> str:
        counts = self.class_counts
        if not counts:
            return "without labels"
        total = len(self.class_names) if self.class_names is not None else len(counts)
        names = [self._name(label) for label in counts]
        of_total = f" of {total}" if total != len(counts) else ""
        low = min(counts.values())
        high = max(counts.values())
        each = f", {low} each" if low == high else f", {low} to {high} each"
        each = each if len(counts) > 1 else ""
        text = (
            f"in {len(counts)}{of_total} class{'es' if total != 1 else ''} ({listed(names)}){each}"
        )
        unlabelled = self.num_images - sum(counts.values())
        return f"{text}, {unlabelled} without a label" if unlabelled else text

    def _name(self, label: int) -> str:
        return shown(self.class_names[label]) if self.class_names is not None else str(label)

    def to_json(self) -> Json:
        """Return the survey as JSON values, for the log of an extraction."""
        return {
            "summary": self.summary,
            "notes": list(self.notes),
            "images": self.num_images,
            "labelled": sum(self.class_counts.values()),
            "left_out": {
                reason.value[1]: {
                    "count": count,
                    "examples": self.left_out.examples[reason][:MAX_EXAMPLES],
                }
                for reason, count in self.left_out.counts.items()
            },
        }


def survey(
    keys: Column[str],
    labels: Column[int | None] | None,
    classes: Sequence[str] | None,
    left_out: LeftOut,
    notes: Sequence[str] = (),
) -> Survey:
    """Return the survey of a source, with notes about classes that are often not meant."""
    counts: dict[int, int] = {}
    if labels is not None:
        values = pc.value_counts(labels.arrow).to_pylist()
        counts = {
            int(entry["values"]): int(entry["counts"])
            for entry in sorted(values, key=lambda e: -1 if e["values"] is None else e["values"])
            if entry["values"] is not None and entry["values"] >= 0
        }
    return Survey(
        num_images=len(keys),
        class_names=tuple(classes) if classes is not None else None,
        class_counts=counts,
        left_out=left_out,
        notes=(*notes, *(_class_notes(classes) if classes is not None else ())),
    )


def _class_notes(classes: Sequence[str]) -> list[str]:
    notes = []
    splits = [name for name in classes if name.lower() in SPLITS]
    if len(splits) > 1:
        notes.append(
            f"the classes {' and '.join(splits)} have the names of splits; if they are splits, "
            "pass the folder of one of them"
        )
    numbered = misnumbered(classes)
    if numbered is not None:
        name, label = numbered
        notes.append(
            f"the classes are named by numbers, but labels are positions in the sorted names: "
            f"class {name} has label {label}; pad the names with zeros to make both equal"
        )
    by_form: dict[str, str] = {}
    for name in classes:
        other = by_form.setdefault(normal_form(name), name)
        if differ_in_form(name, other):
            notes.append(
                f"two classes are named {shown(name)}, in different Unicode forms (NFC and NFD); "
                "rename one of them if they are one class"
            )
            break
    return notes
