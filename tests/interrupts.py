"""Ctrl-C in the middle of a stage."""

from types import ModuleType

import pytest


def interrupt(patch: pytest.MonkeyPatch, module: ModuleType, name: str, call: int) -> list[int]:
    """Let a function of a module raise KeyboardInterrupt in its `call`-th call, once, in place of
    running.

    Returns a list that grows by one a call.
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
