"""Class names by number: those that nobody gave, whether two lists agree, and a warning of those that never occur."""

import sys
from collections.abc import Collection, Sequence

NAMED = 10
"""Names that a warning has room for."""


def numbered(count: int) -> tuple[str, ...]:
    """Return names for so many classes that nobody named."""
    return tuple(f"class {number}" for number in range(count))


def alike(known: Sequence[str], classes: Sequence[str]) -> bool:
    """Return whether numbers stand for the same classes, as far as both sides name and have them."""
    unnamed = any(tuple(names) == numbered(len(names)) for names in (known, classes))
    return unnamed or all(one == other for one, other in zip(known, classes, strict=False))


def warn_of_absent(names: Sequence[str], values: Collection[int], ignore: int, what: str) -> None:
    """Say on stderr which classes do not occur among what is trained on: nothing can be learned of them.

    `values` are the numbers that occur; `what` says of what and where, such as `pixel in the training masks`.
    """
    there = {*values, ignore}
    absent = [f"{number} ({name})" for number, name in enumerate(names) if number not in there]
    if absent:
        few = ", ".join(absent[:NAMED]) + (", ..." if len(absent) > NAMED else "")
        print(
            f"warning: {len(absent)} of {len(names)} classes have no {what} and will hardly be predicted: {few}",
            file=sys.stderr,
        )
