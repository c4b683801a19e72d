"""Options that are text: sizes, taps, shares."""

import re

from dtcache.errors import ConfigError


def parse_size(text: str, flag: str = "--size") -> tuple[int, int]:
    """Parse `H` or `HxW` into (height, width), pixels. Raises ConfigError, naming the flag, where it is neither."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text.lower())
    if found is None:
        raise ConfigError(f"{flag} {text}: expected H or HxW in pixels, such as 256 or 128x256")
    return int(found[1]), int(found[2] or found[1])


def parse_ints(text: str, flag: str) -> tuple[int, ...]:
    """Parse comma-separated positive integers. Raises ConfigError, naming the flag, where it is something else."""
    if not re.fullmatch(r" *[1-9][0-9]{0,8} *(, *[1-9][0-9]{0,8} *)*", text):
        raise ConfigError(
            f"{flag} {text}: expected positive integers separated by commas, such as 8,16,32"
        )
    return tuple(int(part) for part in text.split(","))


def parse_taps(text: str, flag: str = "--taps") -> tuple[str, ...]:
    """Parse names of taps between commas, in which a number is a stride: 8 is stride8.

    Raises ConfigError, naming the flag, where it is something else.
    """
    if not re.fullmatch(r" *[a-z0-9]{1,40} *(, *[a-z0-9]{1,40} *)*", text):
        raise ConfigError(
            f"{flag} {text}: expected strides or names of taps separated by commas, such as 8,16,32 or block10,block16"
        )
    names = [part.strip() for part in text.split(",")]
    return tuple(f"stride{name}" if name.isdecimal() else name for name in names)


def parse_share(text: str, flag: str) -> float:
    """Parse a percentage such as 5% into a share in (0, 1]. Raises ConfigError, naming the flag, where it is none."""
    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", text.strip())
    share = float(found[1]) / 100 if found is not None else 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"{flag} {text}: expected a percentage over 0 and up to 100, such as 5%")
    return share
