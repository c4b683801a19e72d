"""Failures of the machine that any verb can meet, as one line: memory, threads, files, locale."""

import errno
import os

from dtcache.errors import one_line
from dtcache.names import IN_UTF8

TOO_LITTLE_MEMORY = (
    *("map segment", "annot allocate memory", "can't allocate memory"),
    "could not create a primitive",  # of oneDNN
)
"""Parts of the messages of the system and of libraries if there is no memory or address space."""
TOO_FEW_THREADS = ("can't start new thread", "Resource temporarily unavailable")
"""Parts of their messages if no further thread or process may start."""

SHOWN = 40
"""Characters that a message shows before and after those that cannot be encoded."""


def machine_problem(error: Exception) -> str | None:
    """Return how the machine failed, with the fix, or None if the error has another cause."""
    text = str(error)
    if isinstance(error, UnicodeEncodeError):
        text = error.object[max(0, error.start - SHOWN) : error.end + SHOWN]
        return f"{text!r}: expected text that can be encoded as {error.encoding}; {IN_UTF8}"
    if isinstance(error, MemoryError) or any(part in text for part in TOO_LITTLE_MEMORY):
        return (
            f"too little memory ({one_line(error, 200)}); end other programs, or allow this one "
            "more memory (ulimit -v)"
        )
    if any(part in text for part in TOO_FEW_THREADS):
        return (
            f"too few threads or processes ({one_line(error, 200)}); end other programs, or allow "
            "more of them (ulimit -u)"
        )
    if isinstance(error, OSError) and error.filename is not None:
        problem = error.strerror or one_line(error, 200)
        return f"{os.fsdecode(error.filename)}: {problem}; check the path, its rights and the disk"
    return None


def long_name(error: Exception) -> str | None:
    """Return the line for a path that is too long for its file system, None for other errors."""
    if not isinstance(error, OSError) or error.errno != errno.ENAMETOOLONG:
        return None
    longest = max(os.fsdecode(error.filename or "").split("/"), key=len)
    return f"{longest[:SHOWN]}...: expected a shorter name, got {len(longest)} characters"
