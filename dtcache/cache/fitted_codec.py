"""The fitted codec of a cache, read from its Zarr arrays and checked."""

from pathlib import Path
from typing import Any

from dtcache.codec import FittedTap, HalfTap, TapFit, most_bytes, sha256_fit
from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.store.layout import DATA
from dtcache.store.manifest import CacheManifest
from dtcache.store.zarr_nodes import read_fit


def load_fit(root: Path, manifest: CacheManifest) -> dict[str, TapFit]:
    """Read a cache's fitted codec by array. Raises CacheDamagedError where it is not the one that the recipe names."""
    try:
        arrays: dict[str, dict[str, Any]] = {
            name: read_fit(root / DATA, name, most_bytes(shape))
            for name, shape in manifest.tap_shapes.items()
        }
        kind = HalfTap if manifest.recipe["codec"]["name"] == "float16" else FittedTap
        fit: dict[str, TapFit] = {name: kind(**found) for name, found in arrays.items()}
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CacheDamagedError(
            f"{root}: the codec's arrays are damaged ({error}); {AGAIN}"
        ) from error
    if {name: tap.shape for name, tap in fit.items()} != manifest.tap_shapes:
        raise CacheDamagedError(
            f"{root}: the codec's arrays are not of the taps that the recipe names; {AGAIN}"
        )
    if sha256_fit(fit) != manifest.recipe["codec"]["fit_sha256"]:
        raise CacheDamagedError(f"{root}: the codec's arrays are not the fitted ones; {AGAIN}")
    return fit
