"""The embedding of the prompt that a cache's teacher was told: one fp32 array in a safetensors file."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.store.layout import PROMPT

MAX_BYTES = 64 << 20


def embedding_bytes(embedding_LD: NDArray[np.float32]) -> bytes:
    """Return the file's content: a tensor `embedding`, fp32 (tokens, channels)."""
    return save({"embedding": np.ascontiguousarray(embedding_LD, np.float32)})


def read_embedding(root: Path) -> NDArray[np.float32]:
    """Read the embedding, fp32 (tokens, channels), of a cache. Raises CacheDamagedError."""
    path = root / PROMPT
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CacheDamagedError(
                f"{path}: expected at most {MAX_BYTES} bytes, got {path.stat().st_size}"
            )
        found: NDArray[np.float32] = load(path.read_bytes())["embedding"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CacheDamagedError(
            f"{path}: not the embedding of a prompt ({error}); {AGAIN}"
        ) from error
    if found.ndim != 2 or found.dtype != np.float32:
        raise CacheDamagedError(
            f"{path}: expected fp32 (tokens, channels), got {found.dtype} {found.shape}; {AGAIN}"
        )
    return found
