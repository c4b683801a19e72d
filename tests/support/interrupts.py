"""Simulates Ctrl-C in the middle of a stage."""

from types import ModuleType

import pytest


def interrupt(patch: pytest.MonkeyPatch, module: ModuleType, name: str, call: int) -> list[int]:
    """Make call number `call` of a module's function raise KeyboardInterrupt, once.

    Returns a list that grows by one per call.
    """
    real = getattr(module, name)
    calls: list[int] = []

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments)

    patch.setattr(module, name, interrupted)
    return calls
