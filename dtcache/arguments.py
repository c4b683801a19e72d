"""Checks of arguments from Python: each raises ConfigError with the argument's name."""

import re
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from dtcache.errors import ConfigError

SHOWN = 60
"""Most characters of a value in an error."""
_ITEMS: dict[Any, str] = {str: "a str", Integral: "an integer", Real: "a number"}


def require(name: str, value: object, kinds: Any, noun: str) -> None:
    """Raise ConfigError if a value is not of `kinds`; True and False are no numbers."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds in (Integral, Real)):
        raise wrong(name, value, noun)


def wrong(name: str, value: object, noun: str) -> ConfigError:
    """Return the error of a value that is not what `noun` says."""
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
    return ConfigError(
        f"`{name}` {shown}: expected {noun}, got {type(value).__name__}; pass {noun}"
    )


def require_count(name: str, value: object, least: int) -> None:
    """Raise ConfigError if a value is not an integer of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ConfigError(
            f"`{name}` {value!r}: expected an integer of {least} or more; pass another `{name}`"
        )


def is_address(value: object) -> bool:
    """Return whether a value is an address such as s3://bucket/folder, not a local path."""
    return isinstance(value, str) and re.match("[A-Za-z][A-Za-z0-9+.-]*://", value) is not None


def path_of(name: str, value: str | Path) -> Path:
    """Return a path on this machine. Raises ConfigError for another type, and for an address."""
    require(name, value, str | Path, "a path")
    if is_address(value):
        raise ConfigError(
            f"`{name}` {value}: expected a path on this machine, got an address; only a sealed "
            "cache that is read may be in an object store"
        )
    return Path(value)


def list_of(name: str, values: Any, kind: type, noun: str) -> list[Any]:
    """Return the items of an iterable. Raises ConfigError if one is not of `kind`, or for a str."""
    if isinstance(values, str):
        raise ConfigError(f"`{name}` {values!r}: expected a list of {noun}; pass [{values!r}]")
    require(name, values, Iterable, f"a list of {noun}")
    items = list(values)
    for item in items:
        require(name, item, kind, _ITEMS[kind])
    return items
