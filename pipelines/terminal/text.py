"""Formats sizes, durations and untrusted text for a terminal."""

import re

_UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
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
    """Return text from a file with its control characters as escapes, such as `\\x1b`.

    A terminal obeys control characters: they could hide text, forge lines or set its title.
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
