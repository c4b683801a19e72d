"""A cache that an earlier extraction began, compared with the plan that would resume it."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.class_names import class_difference
from dtcache.errors import CacheMismatchError, ConfigError
from dtcache.images import ImageSource
from dtcache.recipe import Json
from dtcache.samples import SampleList
from dtcache.store.layout import MANIFEST
from dtcache.store.manifest import CacheManifest, read_manifest, require_same
from dtcache.store.sample_index import changed_samples, read_samples
from dtcache.store.writer import require_ours


@dataclass(frozen=True, kw_only=True, slots=True)
class BegunCache:
    """A cache that an earlier extraction began, and perhaps finished."""

    root: Path
    manifest: CacheManifest


def find_begun_cache(out: Path) -> BegunCache | None:
    """Return the cache in `out`, or None if `out` is missing or empty.

    Raises ConfigError if `out` is a file, CacheMismatchError if it holds files that dtcache did not
    create, and what reading a manifest raises.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"`out` {out}: expected a folder, got a file; pass another `out`")
    if (out / MANIFEST).exists():
        return BegunCache(root=out, manifest=read_manifest(out))
    if out.is_dir():
        require_ours(out)
    return None


def require_same_recipe(begun: BegunCache, fixed: Json, samples: SampleList) -> None:
    """Raise CacheMismatchError if a begun cache has another value in a field of `fixed`.

    `fixed` holds fields of a plan's recipe, `samples` its sample list. The message names the first
    field that differs. The images come last, because an option such as the seed may be why their
    list differs.
    """
    lists = ("num_samples", "samples_sha256")
    recipe = begun.manifest.recipe
    options = {name: value for name, value in fixed.items() if name not in lists}
    require_same(begun.root, recipe, options)
    if any(recipe[name] != fixed[name] for name in lists):
        changes = changed_samples(
            read_samples(begun.root, begun.manifest, bounded=False).table(), samples
        )
        raise CacheMismatchError(
            f"{begun.root} holds a cache of another recipe: of other images: {changes}; pass the "
            "images and the `limit` that it was begun with, or another `out`"
        )


def require_same_classes(begun: BegunCache, source: ImageSource) -> None:
    """Raise CacheMismatchError if a begun cache names other classes than the images."""
    recorded = begun.manifest.classes
    if recorded is None or source.classes is None:
        return
    difference = class_difference(recorded, source.classes)
    if difference is not None:
        raise CacheMismatchError(
            f"{begun.root} holds a cache of images with other classes, the first list, than these "
            f"images: {difference}; pass the images that it was begun with, or another `out`"
        )
