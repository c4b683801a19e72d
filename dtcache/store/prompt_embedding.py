"""The embedding of the teacher's prompt: one fp32 array in a safetensors file.

Shape suffixes: L tokens, D channels.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.regular_files import read_regular
from dtcache.store.layout import PROMPT

MAX_BYTES = 64 << 20


def embedding_bytes(embedding_LD: NDArray[np.float32]) -> bytes:
    """Return the content of the file: a tensor `embedding`, fp32 (tokens, channels)."""
    return save({"embedding": np.ascontiguousarray(embedding_LD, np.float32)})


def read_embedding(root: Path) -> NDArray[np.float32]:
    """Read a cache's embedding, fp32 (tokens, channels). Raises CacheDamagedError."""
    path = root / PROMPT
    try:
        embedding_LD: NDArray[np.float32] = load(read_regular(path, MAX_BYTES))["embedding"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CacheDamagedError(
            f"{path}: not the embedding of a prompt ({error}); {AGAIN}"
        ) from error
    if embedding_LD.ndim != 2 or embedding_LD.dtype != np.float32:
        raise CacheDamagedError(
            f"{path}: expected fp32 (tokens, channels), got {embedding_LD.dtype} "
            f"{embedding_LD.shape}; {AGAIN}"
        )
    return embedding_LD
