"""What an option is: a field of a frozen dataclass, with its help text, its choices and its bounds."""

import math
from dataclasses import field, fields
from typing import Any

from dtcache.errors import ConfigError

AUTO_DEVICE = "auto, cpu, cuda or cuda:N"
PRECISIONS = ("auto", "fp32", "bf16")
MAX_SEED = 2**32 - 1
"""Generators take 64 bits, and some seed a step with both its number and this."""


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
) -> Any:
    """Return a dataclass field that carries its help text, choices, metavar, bounds and group.

    If `auto` is true, the command line also takes the word auto, which becomes None. `off` names
    the flag that sets a boolean to false (default: `no-` and the name). `group` is the heading in
    `--help` under which the flag stands.
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
    }
    return field(default=default, metadata=metadata)


def seed_option(text: str, *, group: str = "") -> Any:
    """Return the field of a seed, an integer from 0 to `MAX_SEED`."""
    return option(0, text, minimum=0, maximum=MAX_SEED, group=group)


class Options:
    """Checks the bounds of every option, for Python callers and the command line alike."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Raise ConfigError naming the first option that is out of bounds, or a number that is not finite."""
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            choices = f.metadata["choices"]
            least = f.metadata["minimum"]
            most = f.metadata["maximum"]
            flag = f"--{f.name.replace('_', '-')}"
            if choices and value is not None and value not in choices:
                raise ConfigError(f"{flag} {value}: expected one of {', '.join(choices)}")
            if least is not None and value is not None and not value >= least:
                raise ConfigError(f"{flag} {value}: expected at least {least:g}")
            if most is not None and value is not None and not value <= most:
                raise ConfigError(f"{flag} {value}: expected at most {most}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{flag} {value}: expected a finite number")
