"""Parses options that are written as text: sizes, lists of integers, taps.

Each function takes the field's name for its error, because two fields may have the same form.
"""

import re

from dtcache.errors import ConfigError

TIMM = "timm:"
"""Prefix of a teacher that is a timm network."""


def parse_size(text: str, field: str = "size") -> tuple[int, int]:
    """Parse `H` or `HxW` into (height, width) in pixels. Raises ConfigError for any other text."""
    sides = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text.lower())
    if sides is None:
        raise ConfigError(f"`{field}` {text}: expected H or HxW in pixels, such as 256 or 128x256")
    return int(sides[1]), int(sides[2] or sides[1])


def timm_name(teacher: str) -> str | None:
    """Return what follows `timm:` in the name of a teacher; None if it is no timm teacher."""
    return teacher.removeprefix(TIMM) if teacher.startswith(TIMM) else None


def parse_ints(text: str, field: str) -> tuple[int, ...]:
    """Parse positive integers separated by commas. Raises ConfigError for any other text."""
    if not re.fullmatch(r" *[1-9][0-9]{0,8} *(, *[1-9][0-9]{0,8} *)*", text):
        raise ConfigError(
            f"`{field}` {text}: expected positive integers separated by commas, such as 8,16,32"
        )
    return tuple(int(number) for number in text.split(","))


def parse_taps(text: str, field: str = "taps") -> tuple[str, ...]:
    """Parse names of taps separated by commas; a number is a stride, so 8 is stride8.

    Raises ConfigError for any other text.
    """
    if not re.fullmatch(r" *[a-z0-9]{1,40} *(, *[a-z0-9]{1,40} *)*", text):
        raise ConfigError(
            f"`{field}` {text}: expected strides or names of taps separated by commas, "
            "such as 8,16,32 or up2layer1,block16"
        )
    names = [name.strip() for name in text.split(",")]
    return tuple(f"stride{name}" if name.isdecimal() else name for name in names)


def parse_scale(text: str) -> tuple[float, float]:
    """Parse `least,most` fractions of the area.

    Raises ConfigError unless 0 < least <= most <= 1.
    """
    match = re.fullmatch(r" *([01](?:\.[0-9]{1,9})?) *, *([01](?:\.[0-9]{1,9})?) *", text)
    least, most = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not 0 < least <= most <= 1:
        raise ConfigError(
            f"`scale` {text}: expected two rising shares of the area over 0 and up to 1, such as "
            "0.3,1.0"
        )
    return least, most
