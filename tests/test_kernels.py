"""Compiled kernels where nothing can be saved."""

import pytest
from numba.core.dispatcher import Dispatcher

from dtcache.kernels import kernel


def test_without_a_folder_for_machine_code_a_kernel_is_compiled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user without a home folder and with a read-only installation still computes."""

    def no_folder(dispatcher: Dispatcher) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(Dispatcher, "enable_caching", no_folder)
    assert kernel(lambda x: 2 * x + 1)(20) == 41
