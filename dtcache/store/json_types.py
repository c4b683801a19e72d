"""Checks JSON values against the types of a frozen dataclass, before any of the values is used."""

import functools
import math
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_TEXT = 1 << 16
"""Most characters of a text, such as a prompt."""
MAX_INTEGER = 2**63 - 1
PLAIN = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
"""The name of each type in an error message."""


def check_types(value: Any, kind: Any, name: str) -> None:
    """Raise ValueError, with the dotted name of the field, if a JSON value is not of type `kind`.

    `kind` is a dataclass or a type of its fields: bool, int, float, str, Literal, None, unions,
    `tuple[X, ...]`, `dict[str, X]` and Any. Integers have at most 64 bits, numbers are finite, and
    texts have at most MAX_TEXT characters. A field that was added later has the default None and
    may be missing; fields that the dataclass does not have belong to a later version and may be of
    any type.
    """
    origin = get_origin(kind)
    if kind is Any:
        return
    if kind in PLAIN:
        _require(_is_plain(value, kind), name, PLAIN[kind], value)
    elif origin is Literal:
        choices = get_args(kind)
        is_choice = any(type(value) is type(choice) and value == choice for choice in choices)
        _require(is_choice, name, f"one of {', '.join(map(str, choices))}", value)
    elif origin in (Union, types.UnionType):
        inner = [choice for choice in get_args(kind) if choice is not types.NoneType]
        if value is not None:
            check_types(value, inner[0], name)
    elif origin is tuple:
        _require(isinstance(value, list), name, "a list", value)
        for number, item in enumerate(value):
            check_types(item, get_args(kind)[0], f"{name}[{number}]")
    elif origin is dict:
        _require(isinstance(value, dict), name, "an object", value)
        for key, item in value.items():
            check_types(item, get_args(kind)[1], f"{name}.{key[:40]}")
    else:
        _check_fields(value, kind, name)


def _check_fields(value: Any, kind: type, name: str) -> None:
    """Check the fields of a dataclass `kind`. Raises ValueError."""
    if not is_dataclass(kind):
        raise TypeError(f"{name}: no check for values of type {kind}")
    _require(isinstance(value, dict), name, "an object", value)
    hints = _hints(kind)
    for field in fields(kind):
        if field.name in value:
            check_types(value[field.name], hints[field.name], f"{name}.{field.name}")
        elif field.default is not None or field.default is MISSING:
            raise ValueError(f"{name}.{field.name}: expected a value, got none")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_plain(value: Any, kind: type) -> bool:
    if kind is float and type(value) is float:
        return math.isfinite(value)
    if kind in (int, float):
        return type(value) is int and abs(value) <= MAX_INTEGER
    return type(value) is kind and (not isinstance(value, str) or len(value) <= MAX_TEXT)


def _require(valid: bool, name: str, expected: str, value: Any) -> None:
    if not valid:
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """Return a value for a message; of a large one only its type, which takes no time to format."""
    if isinstance(value, str):
        return repr(value[:40])
    is_small = value is None or isinstance(value, float) or value in ([], {})
    if is_small or (isinstance(value, int) and abs(value) <= MAX_INTEGER):
        return repr(value)
    return {dict: "an object", list: "a list", int: "an integer of over 64 bits"}[type(value)]
