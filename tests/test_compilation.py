"""torch.compile: failures of its compiler, in a first call and in a backward pass."""

import pytest
import torch

from dtcache.compilation import compile_errors, compiled
from dtcache.errors import ConfigError


def test_a_compiler_that_fails_in_a_backward_pass_is_named() -> None:
    """An exception of torch's compiler becomes a ConfigError, and other exceptions pass through."""
    from torch._inductor.exc import InvalidCxxCompiler

    with pytest.raises(ConfigError, match=r"`compile`: .*; run without it"), compile_errors():
        raise InvalidCxxCompiler
    with pytest.raises(RuntimeError, match=r"^other$"), compile_errors():
        raise RuntimeError("other")

    def broken(module: object, inputs: object) -> object:
        raise ValueError("no compiler")

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "compile", lambda module, dynamic: torch._dynamo.optimize(broken)(module)
        )
        call = compiled(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"`compile`: .*no compiler.*; run without it"):
        call(torch.zeros(1, 2))
    torch._dynamo.reset()
