"""torch.compile: networks whose compilation fails in one clear line."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dtcache.errors import ConfigError


def compiled(module: torch.nn.Module) -> Callable[..., Any]:
    """Return torch.compile's version of a module; the two share their weights.

    The first call raises ConfigError if this machine has no working compiler. The first backward
    pass compiles too: run it inside `compile_errors`.
    """
    # Graphs compiled earlier in the process would change the last bits of this module's results.
    torch._dynamo.reset()
    network = torch.compile(module, dynamic=False)

    def call(*arguments: Any) -> Any:
        with compile_errors():
            return network(*arguments)

    return call


@contextmanager
def compile_errors() -> Iterator[None]:
    """Raise ConfigError if torch.compile fails in the block; other exceptions pass unchanged."""
    with warnings.catch_warnings():
        # diffusers warns of its caches, which change no result.
        warnings.filterwarnings("ignore", module="torch")
        try:
            yield
        except RuntimeError as error:
            # The compiler's errors share no base class, and their modules load only with a
            # compilation.
            if not type(error).__module__.startswith(
                ("torch._dynamo", "torch._inductor", "torch._functorch")
            ):
                raise
            first, *more = str(error).splitlines() or [type(error).__name__]
            reason = " ".join([first, *more[:1]]) if first.endswith(":") else first
            raise ConfigError(f"`compile`: {reason}; run without it") from error
