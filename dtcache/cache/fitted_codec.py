"""The fitted codec of a cache, read and checked."""

from pathlib import Path
from typing import Any

from dtcache.codec import TapCodec, make_tap_codec, max_array_bytes, sections_of, sha256_fit
from dtcache.errors import AGAIN, CacheDamagedError
from dtcache.store.codec_file import read_fit
from dtcache.store.layout import padded_length
from dtcache.store.manifest import CacheManifest


def load_fit(root: Path, manifest: CacheManifest) -> dict[str, TapCodec]:
    """Read a cache's fitted codec by tap.

    Raises CacheDamagedError if it is not the codec whose hash the recipe records.
    """
    try:
        codec = manifest.recipe["codec"]["name"]
        arrays: dict[str, dict[str, Any]] = read_fit(
            root,
            codec,
            {name: max_array_bytes(shape) for name, shape in manifest.tap_shapes.items()},
        )
        fit = {name: make_tap_codec(codec, stored) for name, stored in arrays.items()}
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CacheDamagedError(
            f"{root}: the codec's arrays are damaged ({error}); {AGAIN}"
        ) from error
    if {name: tap.shape for name, tap in fit.items()} != manifest.tap_shapes:
        raise CacheDamagedError(
            f"{root}: the codec's arrays are not of the taps that the recipe names; {AGAIN}"
        )
    bounds = {array: sections.bound for array, sections in sections_of(fit).items()}
    if any(manifest.arrays[name].length != padded_length(bounds[name]) for name in bounds):
        raise CacheDamagedError(
            f"{root}: the payloads' lengths are not those of the codec's arrays; {AGAIN}"
        )
    if sha256_fit(fit) != manifest.recipe["codec"]["fit_sha256"]:
        raise CacheDamagedError(f"{root}: the codec's arrays are not the fitted ones; {AGAIN}")
    return fit
