"""Write the golden cache of this format version, and what must be read from it for ever after.

    PYTHONPATH=.:tests python tests/golden/write.py

Run it when the format's version changes, into a new folder, never to make a failing test pass.
"""

import sys
from pathlib import Path

import numpy as np
from store.builders import FAILED_ROW, FEATURES, IMAGES, ROWS, VIEWS, tiny_plan, write_cache

from dtcache.cache.cache import Cache
from dtcache.recipe import FORMAT_VERSION

HERE = Path(__file__).parent / f"format{FORMAT_VERSION}"


def main() -> None:
    """Write HERE/cache and HERE/expected.npz."""
    if HERE.exists():
        sys.exit(f"{HERE} is there already; a golden cache is written once")
    plan = tiny_plan()
    cache = Cache(write_cache(HERE / "cache", plan))
    rows = np.array([row for row in range(ROWS) if row != FAILED_ROW])
    pairs = np.repeat(rows, VIEWS), np.tile(np.arange(VIEWS), len(rows))
    expected = {"rows": rows, "pixels": plan.pixels[rows]}
    for name in (IMAGES, FEATURES):
        where = pairs if name != IMAGES else (rows, np.zeros_like(rows))
        payloads = [plan.payload(name, row, view) for row, view in zip(*where, strict=True)]
        expected[f"{name}/sizes"] = np.array([len(payload) for payload in payloads])
        expected[f"{name}/payloads"] = np.frombuffer(b"".join(payloads), np.uint8)
    for name, features in cache.raw(cache.names, rows).items():
        expected[f"{name}/coefficients"] = plan.values[name][rows]
        expected[f"{name}/features"] = features.numpy()
    np.savez_compressed(HERE / "expected.npz", **expected)


if __name__ == "__main__":
    main()
