"""An option: a field of a frozen dataclass with its help text, choices, bounds and group."""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from dtcache.arguments import path_of, require
from dtcache.errors import ConfigError

AUTO_DEVICE = "auto, cpu, cuda or cuda:N"
IGNORE_HELP = "Mask value excluded from loss and scores [default: from classes.toml, else 255]."
PRECISIONS = ("auto", "fp32", "bf16")
MAX_SEED = 2**32 - 1
"""Largest seed: 32 bits, because some 64-bit generator seeds combine it with a step number."""
MAX_INTEGER = 2**31 - 1
"""Largest integer of an option that has no smaller maximum."""
MAX_BATCH = 1 << 20
"""Most samples of a batch."""
MAX_PARALLEL = 1024
"""Most threads, processes or jobs that an option starts."""
MAX_WIDTH = 4096
"""Most channels of the layers of a head or a regressor."""
MAX_SCENES = 10_000_000
"""Most scenes of a set."""


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    auto: bool = False,
    off: str = "",
    group: str = "",
    may_be_empty: bool = False,
) -> Any:
    """Return a dataclass field that carries its help text, choices, metavar, bounds and group.

    If `auto` is true, the command line also accepts the word auto, which becomes None. `off` names
    the flag that sets a boolean to false (default: `no-` and the name). `group` is the heading in
    `--help` under which the flag stands. An optional text is not empty unless `may_be_empty`.
    """
    metadata = {
        "help": text,
        "choices": choices,
        "metavar": metavar,
        "minimum": minimum,
        "maximum": maximum,
        "auto": auto,
        "off": off,
        "group": group,
        "may_be_empty": may_be_empty,
    }
    return field(default=default, metadata=metadata)


def seed_option(text: str, *, group: str = "") -> Any:
    """Return the field of a seed, an integer from 0 to `MAX_SEED`."""
    return option(0, text, minimum=0, maximum=MAX_SEED, group=group)


class Options:
    """Base of all option classes: checks the type, the choices and the bounds of every field."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Raise ConfigError for the first field of another type, empty or out of bounds.

        A field of a path takes text too, a field of several values takes a single one, and an
        integer is a number.
        """
        hints = typing.get_type_hints(type(self))
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value == "" and f.default != "" and not f.metadata["may_be_empty"]:
                raise ConfigError(
                    f"`{f.name}`: expected a value, got an empty text; leave `{f.name}` out for "
                    "the default"
                )
            if value != "":  # "" stands for a path that was not given, not for the working folder
                value = _typed(f.name, value, hints[f.name])
                object.__setattr__(self, f.name, value)
            if value is not None:
                _check(f.name, value, f.metadata)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return a value as the type of its field. Raises ConfigError with the field's name."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, tuple | list) else [value]
        return tuple(_typed(name, item, typing.get_args(hint)[0]) for item in items)
    require(name, value, *_ACCEPTED[hint])
    return path_of(name, value) if hint is Path else hint(value)


_ACCEPTED: Mapping[type, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: (str | Path, "a str"),
    Path: (str | Path, "a path"),
}
"""By the type of a field: the types that it takes, and their name in an error."""


def _check(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    choices = metadata["choices"]
    minimum = metadata["minimum"]
    maximum = metadata["maximum"]
    if choices and value not in choices:
        raise ConfigError(f"`{name}` {value}: expected one of {', '.join(choices)}")
    # `not >=` and `not <=` refuse NaN too.
    if minimum is not None and not value >= minimum:
        raise ConfigError(f"`{name}` {value}: expected at least {minimum:g}")
    if maximum is not None and not value <= maximum:
        raise ConfigError(f"`{name}` {value}: expected at most {maximum}")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int) and abs(number) > max(MAX_INTEGER, maximum or 0):
            raise ConfigError(
                f"`{name}` {number}: expected a number from {-MAX_INTEGER} to {MAX_INTEGER}"
            )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"`{name}` {value}: expected a finite number")
