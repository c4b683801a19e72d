"""Formats sizes, durations and untrusted text for a terminal."""

import re

_UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters except newlines, separators of lines, and marks that reverse a line."""


def byte_size(count: float | None) -> str:
    """Return a number of bytes with a unit of 1024s, or a dash for None."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a number of seconds as text: seconds, minutes, or hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )


def printable(text: str) -> str:
    """Return text whose control characters, which names in a cache may have, are replaced."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)
