"""The store loads no model library, so that tools start in a fraction of a second."""

import subprocess
import sys

HEAVY = (
    "torch",
    "torchvision",
    "diffusers",
    "timm",
    "numba",
    "transformers",
    "sklearn",
    "matplotlib",
)


def test_the_store_loads_no_model_library() -> None:
    """Importing manifest, writer and reader loads no torch, diffusers, timm or numba."""
    code = (
        "import sys, dtcache.store.reader, dtcache.store.writer, dtcache.store.manifest\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
