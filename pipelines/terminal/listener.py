"""Messages and progress of a verb that is called from Python: to a callback, never printed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from dtcache.arguments import require


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A message, or the progress of one task of a verb."""

    title: str
    """The task, such as `extract`; empty for a message."""
    done: int = 0
    """Finished units, such as images or steps."""
    total: int = 0
    """Units of the task; 0 for a message."""
    note: str = ""
    """The message, or details of the task, such as the loss."""


Listener = Callable[[Progress], None]
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def listener() -> Listener | None:
    """Return the callback of the running verb; None on the command line, which prints."""
    return _LISTENER.get()


@contextmanager
def listening(callback: Listener | None) -> Iterator[None]:
    """Send messages and progress to a callback, or nowhere if it is None, inside the block.

    Raises ConfigError if `progress` cannot be called.
    """
    if callback is not None:
        require("progress", callback, Callable, "a function")
    token = _LISTENER.set(callback or _ignore)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def _ignore(progress: Progress) -> None:
    """Drop the progress."""
