"""JSON values are compared with the types of a dataclass, and the field that differs is named."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from dtcache.store.json_types import check_types


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A part with an optional field."""

    count: int
    later: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    """One field of every kind."""

    flag: bool
    share: float
    name: str
    kind: Literal["a", "b"]
    inner: Inner
    rest: tuple[Inner, ...]
    by_name: dict[str, float]
    step: float | None
    free: Any
    used: bool = True


GOOD = {
    "flag": True,
    "share": 1,
    "name": "é",
    "kind": "a",
    "inner": {"count": 0},
    "rest": [{"count": 1, "later": None}, {"count": 2, "later": "x", "unknown": []}],
    "by_name": {"x": 0.5},
    "step": None,
    "free": {"anything": [1]},
    "used": False,
}


def test_a_value_of_the_types_passes() -> None:
    """Integers pass as numbers, later fields may be missing, unknown fields may be there."""
    check_types(GOOD, Outer, "recipe")
    check_types({**GOOD, "step": 2.5, "more": 1}, Outer, "recipe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flag": 1}, "recipe.flag: expected true or false, got 1"),
        ({"share": True}, "recipe.share: expected a finite number, got True"),
        ({"share": float("nan")}, "recipe.share: expected a finite number, got nan"),
        ({"share": 10**30}, "recipe.share: expected a finite number, got an integer of over 64"),
        ({"share": None}, "recipe.share: expected a finite number, got None"),
        ({"name": 3}, "recipe.name: expected text, got 3"),
        ({"name": "x" * 70_000}, "recipe.name: expected text, got 'xxx"),
        ({"kind": "c"}, "recipe.kind: expected one of a, b, got 'c'"),
        ({"kind": []}, r"recipe.kind: expected one of a, b, got \[\]"),
        ({"inner": 5}, "recipe.inner: expected an object, got 5"),
        ({"inner": {}}, "recipe.inner.count: expected a value, got none"),
        ({"inner": {"count": 1.0}}, "recipe.inner.count: expected an integer, got 1.0"),
        ({"inner": {"count": 2**63}}, "recipe.inner.count: expected an integer, got an integer of"),
        ({"inner": {"count": 1, "later": 1}}, "recipe.inner.later: expected text, got 1"),
        ({"rest": {"count": 1}}, "recipe.rest: expected a list, got an object"),
        ({"rest": [{"count": 1}, 2]}, r"recipe.rest\[1\]: expected an object, got 2"),
        ({"by_name": [1]}, "recipe.by_name: expected an object, got a list"),
        ({"by_name": {"x" * 99: "1"}}, "recipe.by_name.x{40}: expected a finite number, got '1'"),
        ({"step": "1"}, "recipe.step: expected a finite number, got '1'"),
        ({"used": None}, "recipe.used: expected true or false, got None"),
    ],
)
def test_a_value_of_another_type_is_named(changes: dict, message: str) -> None:
    """The message has the dotted name of the field, the expected type and a short value."""
    with pytest.raises(ValueError, match=f"^{message}") as error:
        check_types({**GOOD, **changes}, Outer, "recipe")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["flag", "inner", "rest", "by_name", "step", "free", "used"])
def test_a_field_without_a_default_may_not_be_missing(name: str) -> None:
    """Only fields whose default is None may be missing: they were added later."""
    value = {key: inner for key, inner in GOOD.items() if key != name}
    with pytest.raises(ValueError, match=rf"^recipe\.{name}: expected a value, got none$"):
        check_types(value, Outer, "recipe")
