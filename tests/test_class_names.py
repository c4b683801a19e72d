"""Class names by number: placeholders, agreement, and the warning of absent classes."""

import pytest

from dtcache.class_names import numbered, same_classes, warn_of_absent


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


def test_absent_classes_are_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """One line names the first ten absent classes, never the ignored one; no line if all occur."""
    warn_of_absent(numbered(16), [0, 2], 1, "pixel in the training masks")
    names = ", ".join(f"{n} (class {n})" for n in range(3, 13))
    assert capsys.readouterr().err == (
        "warning: 13 of 16 classes have no pixel in the training masks and will hardly be "
        "predicted: " + names + ", ...\n"
    )
    warn_of_absent(("sky", "road"), {0, 1}, 255, "pixel")
    assert capsys.readouterr().err == ""
