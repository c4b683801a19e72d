"""A limit on networks that a folder's configuration describes: the size of their weights file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

HALF = ("F16", "BF16")
"""Types of saved weights that take twice as many bytes in fp32."""
SPARE_PARAMETERS = 1000
"""Parameters that a network may register and drop again while it is built."""
SPARE_BYTES = 1 << 28


class BuildLimitError(Exception):
    """A network that is larger than the weights that it is built for."""


def weight_sizes(paths: Sequence[Path]) -> tuple[int, int]:
    """Return the number of tensors in safetensors files, and the bytes that they take in fp32.

    Reads the headers alone. Raises SafetensorError or OSError.
    """
    tensors = 0
    size = 0
    for path in paths:
        with safetensors.safe_open(path, "pt") as file:
            names: list[str] = file.keys()
            is_half = any(file.get_slice(name).get_dtype() in HALF for name in names)
        tensors += len(names)
        size += path.stat().st_size * (2 if is_half else 1)
    return tensors, size


@contextmanager
def limited_build(paths: Sequence[Path]) -> Iterator[None]:
    """Raise BuildLimitError in the block once a network outgrows the weights in `paths`.

    A small configuration can describe millions of layers or a layer of billions of channels. The
    block ends at the first parameter beyond the limit, before its memory is written.
    """
    tensors, size = weight_sizes(paths)
    most_parameters = 2 * tensors + SPARE_PARAMETERS
    most_bytes = 2 * size + SPARE_BYTES
    parameters = 0
    bytes_so_far = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters, bytes_so_far
        if parameter is None:
            return
        parameters += 1
        bytes_so_far += parameter.nbytes
        if parameters > most_parameters:
            raise BuildLimitError(
                f"its configuration has more than {most_parameters} parameters, the file has "
                f"{tensors} tensors"
            )
        if bytes_so_far > most_bytes:
            raise BuildLimitError(
                f"its configuration needs {bytes_so_far} bytes or more, the file has {size}"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
