"""Files that the listing of a source leaves out: counts and examples by reason."""

from enum import Enum

from dtcache.names import shown

MAX_EXAMPLES = 3
"""Examples of each reason."""


class Reason(Enum):
    """Why a file, link or member is not an image, as text for one of them and for several."""

    LINKED_FOLDER = ("link to a folder", "links to folders")
    CIRCLE = ("link to a folder around it", "links to folders around them")
    NOWHERE = ("link to nowhere", "links to nowhere")
    HIDDEN = ("hidden name", "hidden names")
    OTHER = ("file of another name", "files of other names")
    SPECIAL = ("special file", "special files")
    METADATA = ("Parquet file without images", "Parquet files without images")
    BESIDE = ("image file beside Parquet files", "image files beside Parquet files")
    SPLIT = ("file of another split", "files of other splits")
    LABEL = ("label without an image", "labels without an image")
    TRAILING = ("tar with bytes after its end", "tars with bytes after their end")


class LeftOut:
    """Counts what a listing leaves out, with a few distinct examples of each reason."""

    def __init__(self) -> None:
        self.counts: dict[Reason, int] = {}
        self.examples: dict[Reason, list[str]] = {}

    def add(self, reason: Reason, example: str) -> None:
        """Count one more; for files of other names, the example is their extension, if any."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) <= MAX_EXAMPLES and shown(example) not in examples:
            examples.append(shown(example))

    def add_other(self, name: str) -> None:
        """Count a file whose name is not that of an image."""
        stem, dot, extension = name.rpartition("/")[2].rpartition(".")
        self.add(Reason.OTHER, f".{extension.lower()}" if stem and dot else name)

    def __str__(self) -> str:
        """Return the counts as text, such as `3 links to folders (a, b, c)`; empty for none."""
        texts = []
        for reason in Reason:
            count = self.counts.get(reason)
            if count is not None:
                known = self.examples[reason]
                more = ", ..." if len(known) > MAX_EXAMPLES else ""
                examples = ", ".join(known[:MAX_EXAMPLES]) + more
                texts.append(f"{count} {reason.value[count > 1]} ({examples})")
        return ", ".join(texts)

    @property
    def remedy(self) -> str:
        """The option that reads what was left out, as the end of a sentence; empty if none does."""
        return (
            "; `follow_links` reads links to folders" if Reason.LINKED_FOLDER in self.counts else ""
        )


def is_hidden(name: str) -> bool:
    """Return whether a name, without folders, is hidden or one that macOS adds to archives."""
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"
