"""Class names by number: placeholders, agreement, and the warning of absent classes."""

import re

import pytest

from dtcache.class_names import (
    absent_warning,
    class_difference,
    misnumbered,
    numbered,
    same_classes,
)


@pytest.mark.parametrize(
    ("known", "classes", "same"),
    [
        (("sky", "road"), ("sky", "road"), True),
        (("sky",), ("sky", "road"), True),
        (("road", "sky"), ("sky", "road"), False),
        (numbered(2), ("sky", "road"), True),
        (("sky", "road"), numbered(3), True),
    ],
    ids=[
        "the same",
        "the first of them",
        "another order",
        "masks without names",
        "labels without names",
    ],
)
def test_numbers_stand_for_the_same_classes_as_far_as_both_name_them(
    known: tuple[str, ...], classes: tuple[str, ...], same: bool
) -> None:
    """Placeholders agree with any name, and a shorter list agrees if its names do."""
    assert same_classes(known, classes) is same


def test_absent_classes_are_named_in_one_line() -> None:
    """One line names the first ten absent classes, never the ignored one; no line if all occur."""
    names = ", ".join(f"{n} (class {n})" for n in range(3, 13))
    assert absent_warning(numbered(16), [0, 2], 1, "pixel in the training masks") == (
        "warning: 13 of 16 classes have no pixel in the training masks and will hardly be "
        "predicted: " + names + ", ..."
    )
    assert absent_warning(("sky", "road"), {0, 1}, 255, "pixel") is None


@pytest.mark.parametrize(
    ("second", "difference"),
    [
        (["a", "b"], None),
        (["b", "a"], "both have the same names in another order: a is class 0 in one and 1 in the"),
        (["a"], "only the first has b$"),
        (["a", "c", "d"], "only the first has b and only the second has c, d$"),
    ],
)
def test_a_difference_of_classes_is_named(second: list[str], difference: str | None) -> None:
    """Other names, and another order, are said; equal lists differ in nothing."""
    told = class_difference(["a", "b"], second)
    assert told is None if difference is None else re.match(difference, told or "")


def test_unicode_forms_of_classes_are_said_to_differ() -> None:
    """A name that looks the same in both lists has different Unicode forms."""
    assert class_difference(["caf\u00e9"], ["cafe\u0301"]) == (
        "caf\u00e9 has different Unicode forms (NFC and NFD) in both"
    )


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["0", "1", "10", "2"], ("10", 2)),
        (["00", "01", "02"], None),
        (["3", "4"], ("3", 0)),
        (["0", "1", "cat"], None),
        (["9" * 5000], None),
    ],
)
def test_numbers_out_of_order_are_found(names: list[str], first: tuple[str, int] | None) -> None:
    """The first class that is named by a number other than its own is found."""
    assert misnumbered(names) == first
