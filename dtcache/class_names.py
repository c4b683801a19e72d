"""Class names by number: placeholders, comparison, and a warning of classes that do not occur."""

import sys
from collections.abc import Collection, Sequence

MAX_LISTED = 10
"""Most classes that a warning lists."""


def numbered(count: int) -> tuple[str, ...]:
    """Return placeholder names for `count` classes without names."""
    return tuple(f"class {number}" for number in range(count))


def same_classes(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether equal numbers stand for equal classes in both lists.

    Only numbers that both lists have are compared. Placeholder names agree with any names.
    """
    unnamed = any(tuple(names) == numbered(len(names)) for names in (first, second))
    return unnamed or all(one == other for one, other in zip(first, second, strict=False))


def warn_of_absent(names: Sequence[str], values: Collection[int], ignore: int, unit: str) -> None:
    """Warn on stderr of classes that do not occur in the training data: they cannot be learned.

    `values` are the class numbers that occur; `ignore` is never warned of. `unit` completes "no
    ...", such as `pixel in the training masks`.
    """
    present = {*values, ignore}
    absent = [f"{number} ({name})" for number, name in enumerate(names) if number not in present]
    if absent:
        listed = ", ".join(absent[:MAX_LISTED]) + (", ..." if len(absent) > MAX_LISTED else "")
        print(
            f"warning: {len(absent)} of {len(names)} classes have no {unit} and will hardly be "
            f"predicted: {listed}",
            file=sys.stderr,
        )
