"""Class names by number: placeholders, comparison, and warnings."""

from collections.abc import Collection, Sequence

from dtcache.names import differ_in_form, normal_form, shown

MAX_LISTED = 10
"""Most classes that one line lists."""


def listed(names: Sequence[str]) -> str:
    """Return the first names, separated by commas, with `...` for the others."""
    return ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")


def numbered(count: int) -> tuple[str, ...]:
    """Return placeholder names for `count` classes without names."""
    return tuple(f"class {number}" for number in range(count))


def same_classes(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether equal numbers stand for equal classes in both lists.

    Only numbers that both lists have are compared. Placeholder names agree with any names.
    """
    unnamed = any(tuple(names) == numbered(len(names)) for names in (first, second))
    return unnamed or all(one == other for one, other in zip(first, second, strict=False))


def class_difference(first: Sequence[str], second: Sequence[str]) -> str | None:
    """Return how two lists of class names differ, or None if they are equal.

    The text starts with `only`, `both` or the names that differ in their Unicode form.
    """
    if list(first) == list(second):
        return None
    if set(map(normal_form, first)) == set(map(normal_form, second)):
        other = {normal_form(name): name for name in second}
        for name in first:
            if differ_in_form(name, other[normal_form(name)]):
                return f"{shown(name)} has different Unicode forms (NFC and NFD) in both"
        if set(first) == set(second):
            name = next(one for one, two in zip(first, second, strict=False) if one != two)
            return (
                f"both have the same names in another order: {shown(name)} is class "
                f"{list(first).index(name)} in one and {list(second).index(name)} in the other"
            )
    lacking = [
        f"only {side} has {', '.join(map(shown, names[: MAX_LISTED // 2]))}"
        for side, names in (
            ("the first", sorted(set(first) - set(second))),
            ("the second", sorted(set(second) - set(first))),
        )
        if names
    ]
    return " and ".join(lacking)


def misnumbered(names: Sequence[str]) -> tuple[str, int] | None:
    """Return the first class that is named by a number other than its own, and its own number.

    Returns None if some class is not named by a decimal number, or if all numbers agree.
    """
    if not all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names):
        return None
    return next(((name, i) for i, name in enumerate(names) if int(name) != i), None)


def absent_warning(
    names: Sequence[str], values: Collection[int], ignore: int, unit: str
) -> str | None:
    """Return a warning of classes that do not occur in the training data: they cannot be learned.

    `values` are the class numbers that occur; the class `ignore` may be absent. `unit` completes
    "no ...", such as `pixel in the training masks`. Returns None if every class occurs.
    """
    present = {*values, ignore}
    absent = [f"{number} ({name})" for number, name in enumerate(names) if number not in present]
    if not absent:
        return None
    return (
        f"warning: {len(absent)} of {len(names)} classes have no {unit} and will hardly be "
        f"predicted: {listed(absent)}"
    )
